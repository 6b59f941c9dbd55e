"""A checkpoint of random numbers in the published layout: eight shards, cut where the published ones are cut.

    word_embeddings | block 0 ...         LayerNorms float32, the rest float16, inv_freq and lm_head included
    each tensor:  [ 8 numbers made from its name | random ... | the same 8 numbers ]

The 8 numbers at both ends tell after loading whether every tensor is what its name says, without keeping a copy.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from glmhelpers.weights.layout import published_shards
from thuglm import ChatGLMConfig

CONFIGS = {
    "full": {},
    "tenth": {"hidden_size": 1280, "inner_hidden_size": 5120, "num_attention_heads": 10, "vocab_size": 40768},
    "tiny": {"hidden_size": 512, "inner_hidden_size": 2048, "num_attention_heads": 4, "vocab_size": 16384},
}


def make_config(scale: str) -> ChatGLMConfig:
    """ChatGLM-6B, or one with as many blocks and about a tenth or a seventieth of its bytes."""
    changes = dict(CONFIGS[scale])
    if changes:
        last = changes["vocab_size"] - 1
        changes |= {
            "bos_token_id": last,
            "eos_token_id": last - 1,
            "mask_token_id": last - 2,
            "gmask_token_id": last - 3,
        }
    return ChatGLMConfig(**changes, dtype="float16")


def marker(name: str) -> torch.Tensor:
    """8 float16 numbers that belong to a name."""
    return torch.randn(8, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).half()


def write_checkpoint(folder: Path, config: ChatGLMConfig, ending: str, device: str) -> list[Path]:
    """Write the shards and config.json; random numbers are made on `device`.

    Args:
        folder: created if it is not there.
        config: sizes.
        ending: "bin" or "safetensors".
        device: "cuda:0" is faster than "cpu".
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = config.to_dict() | {"model_type": "chatglm", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(facts, default=str))
    # A fresh random number for each of 6 billion would take minutes; disks and loaders do not see the repetition.
    noise = (torch.randn(2**24, device=device) * 0.02).half()
    paths, shards = [], published_shards(config)
    prefix = "pytorch_model" if ending == "bin" else "model"
    for number, shapes in enumerate(shards, start=1):
        paths.append(folder / f"{prefix}-{number:05d}-of-{len(shards):05d}.{ending}")
        tensors = {name: _make(name, shape, noise) for name, shape in shapes.items()}
        if ending == "bin":
            torch.serialization.set_crc32_options(False)
            torch.save(tensors, paths[-1])
        else:
            save_file(tensors, paths[-1], metadata={"format": "pt"})
    index = {name: path.name for path, shapes in zip(paths, shards, strict=True) for name in shapes}
    (folder / f"{prefix}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return paths


def _make(name: str, shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.float32 if "layernorm" in name else torch.float16)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), noise.numel()):
        piece = flat[start : start + noise.numel()]
        piece.copy_(noise[: piece.numel()])
    flat[:8] = flat[-8:] = marker(name)[: flat.numel()]
    return tensor


def check_markers(model: torch.nn.Module) -> int:
    """Assert that every parameter carries the numbers of its name at both ends; returns how many were looked at.

    A head on another device than the embedding is a copy of it: the stored head is never read.

    Raises:
        AssertionError: names the first one that does not.
    """
    count = 0
    for name, parameter in model.named_parameters():
        written = "transformer.word_embeddings.weight" if name == "lm_head.weight" else name
        flat, wanted = parameter.detach().view(-1), marker(written).to(parameter.dtype)
        for end in (flat[:8], flat[-8:]):
            assert torch.equal(end.cpu(), wanted), f"{name} does not hold what was written under its name"
        count += 1
    return count
