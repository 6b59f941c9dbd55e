"""Write a ChatGLM the way ChatGLM-6B was published: eight .bin shards, an index, two configs and a manifest.

    shard 1         word_embeddings, layer 0 ...       cut after a tensor, not after a layer, as the published ones are
    shards 2 .. 6   layers in order
    shard 7         ... last layer, final_layernorm
    shard 8         lm_head (equal to word_embeddings, stored all the same)

Each layer also stores rotary_emb.inv_freq, which every loader must ignore: the real shards have it too.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmhelpers.weights.manifest import checksums
from thuglm import ChatGLMForConditionalGeneration

SHARDS = 8
CONFIG_KEYS = [
    *("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id"),
    *("hidden_size", "inner_hidden_size", "num_attention_heads", "num_layers", "vocab_size"),
    *("layernorm_epsilon", "max_sequence_length", "position_encoding_2d"),
]


def published_tensors(model: ChatGLMForConditionalGeneration) -> dict[str, Tensor]:
    """The model's tensors in published order, float16 on the CPU, with an inv_freq for each layer."""
    config = model.config
    half = config.hidden_size // config.num_attention_heads // 2
    inv_freq = 1.0 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("inv_freq"):
            continue
        # clone: a view would drag its whole storage into the file
        tensors[name] = value.detach().to("cpu", torch.float16).clone().contiguous()
        if name.endswith("attention.dense.bias"):
            layer = name.removesuffix("dense.bias")
            tensors[f"{layer}rotary_emb.inv_freq"] = inv_freq.half()
    return tensors


def split_into_shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Seven shards of about equal bytes in the order of the tensors, and lm_head alone in the eighth."""
    body = {name: value for name, value in tensors.items() if not name.startswith("lm_head")}
    total = sum(value.nbytes for value in body.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    seen = 0
    for name, value in body.items():
        middle = seen + value.nbytes / 2
        shards[min(int(middle / total * (SHARDS - 1)), SHARDS - 2)][name] = value
        seen += value.nbytes
    shards[-1]["lm_head.weight"] = tensors["lm_head.weight"]
    return shards


def write(path: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def write_json(path: Path, value: dict) -> None:
    """Write a dictionary as indented JSON."""
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def publish(model: ChatGLMForConditionalGeneration, folder: Path, tokenizer_config: Path) -> None:
    """Write shards, index, config.json, tokenizer_config.json and weights_manifest.json beside ice_text.model.

    Args:
        model: the trained model, in any dtype.
        folder: holds ice_text.model already.
        tokenizer_config: the published tokenizer_config.json, copied unchanged.
    """
    weight_map, total = {}, 0
    for number, shard in enumerate(split_into_shards(published_tensors(model)), start=1):
        name = f"pytorch_model-{number:05d}-of-{SHARDS:05d}.bin"
        # Saved into memory first: the name inside the archive is then always "archive", and the bytes the same.
        buffer = io.BytesIO()
        torch.save(shard, buffer)
        write(folder / name, buffer.getvalue())
        weight_map.update(dict.fromkeys(shard, name))
        total += sum(value.nbytes for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "pytorch_model.bin.index.json", index)

    config = {key: getattr(model.config, key) for key in CONFIG_KEYS}
    config |= {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "torch_dtype": "float16", "use_cache": True}
    write_json(folder / "config.json", dict(sorted(config.items())))
    settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", settings | {"name_or_path": "tiny-chatglm"})
    write_manifest(folder, config)


def write_manifest(
    folder: Path, config: dict, model: str = "tiny ChatGLM, made by scripts/build_tiny_checkpoint.py", **more: Any
) -> None:
    """weights_manifest.json: size and sha256 of the large files, in the shape of the manifest of ChatGLM-6B.

    Args:
        folder: holds ice_text.model and the shards.
        config: what config.json says.
        model: what it is.
        more: further entries, see `glmhelpers.weights.manifest`.
    """
    names = ["ice_text.model", *sorted(path.name for path in folder.glob("pytorch_model-*.bin"))]
    sha256, _ = checksums(folder, names, keep=False)
    manifest = {
        "model": model,
        **more,
        "files": {name: {"size": (folder / name).stat().st_size, "sha256": sha256[name]} for name in names},
        "config": {key: value for key, value in sorted(config.items()) if key != "architectures"},
    }
    write_json(folder / "weights_manifest.json", manifest)
