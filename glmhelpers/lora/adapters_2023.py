"""Adapters of 2023. First those of the LoRA script: `chatglm-lora.pt`, a dict of trained tensors by name, no settings.

    peft 0.2      base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight
    peft 0.3 on   base_model.model.transformer.layers.0.attention.query_key_value.lora_A.default.weight

The script's own loader used strict=False: a key that fitted nowhere was dropped without a word. Here every tensor must
find its place and every place its tensor.

peft 0.2 had a second form. For a single fused matrix it trained two thirds of its rows, each with an A of its own:

    stored   A [2r, in]   B [2/3 out, r]            rank 2r    A [2r, in]    B [out, 2r]
             A1 ─► B1 ─► rows of the first third               A1            B1  0
             A2 ─► B2 ─► rows of the last third                A2            0   0
                                                                             0   B2
Both do the same; on the right it is an ordinary adapter, so that is what such a file becomes (alpha doubles too, since
the correction is multiplied by alpha / rank). Its number of parameters, 3,670,016 for r = 8, does not tell them apart.

Then those of the `ptuning` folder that the authors of ChatGLM published: a checkpoint's `pytorch_model.bin` holds the
prefix alone, `transformer.prefix_encoder.*`. The network of a prefix_projection is run once: what it makes is all that
an answer needs.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from glmhelpers.lora.adapter_files import CONFIG, FLOATS, AdapterFiles, check_config, check_tensors, read_json
from glmhelpers.lora.attach import PREFIX, adapter_from, prefix_config, refuse_second
from glmhelpers.utils.folders import expanded

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<side>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


def import_2023(base: nn.Module, path: str | Path, alpha: float | None = None, dropout: float = 0.1) -> PeftModel:
    """The base with the adapter of a 2023 file on it; save it with `save_adapter` to have it in today's form.

    Args:
        base: a ChatGLM without an adapter, on its devices.
        path: the file, usually named `chatglm-lora.pt`.
        alpha: `lora_alpha` of that training, which the file does not hold. None: that of an `adapter_config.json` which
            lies beside it, else 32 as in the 2023 script.
        dropout: for training on; the 2023 script's was 0.1.

    Raises:
        ValueError: the file is no such adapter, does not fit this base, or contradicts the settings beside it, or
            these are not plain LoRA's; says which tensor or setting, and why.
    """
    refuse_second(base)
    path = expanded(path)
    name = path.name
    tensors, rank, factor = _as_ordinary(read_2023(path), base, name)
    targets = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
    config = {"target_modules": targets, **_settings(path.absolute().parent, rank, factor, alpha)}
    check_tensors(tensors, config, name)
    files = AdapterFiles(name, config, tensors, None)
    files.check_layers(dict(base.named_modules()))
    settings = files.lora_config(trainable=True)
    settings.lora_dropout = dropout
    return adapter_from(base, settings, tensors, name).eval()


def _settings(folder: Path, rank: int, factor: int, alpha: float | None) -> dict[str, Any]:
    """adapter_config.json beside the file, else the 2023 script's; what the caller says must agree with it.

    Args:
        folder: where the file lies.
        rank: of the ordinary adapter that it becomes.
        factor: 2 for the form of two thirds, else 1: rank and alpha of the settings are multiplied by it.
        alpha: what the caller says.
    """
    where = "import_2023"
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank // factor, "lora_alpha": 32 if alpha is None else alpha}
    if (folder / CONFIG).is_file():
        where, config = f"{CONFIG} beside the file", read_json(folder, CONFIG)
        if factor == 2 and config.get("enable_lora") == [True, False, True]:
            del config["enable_lora"]
    check_config({"target_modules": ["any"], **config}, where)
    said = config["lora_alpha"]
    if config["r"] != rank // factor:
        raise ValueError(
            f"{where} says r={config['r']}, the file has rank {rank // factor}: they do not belong together. Take away "
            "the settings, and give alpha."
        )
    if alpha is not None and alpha != said:
        raise ValueError(f"alpha={alpha} was given, {where} says {said}: leave alpha out")
    if factor == 2 and (odd := [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]):
        raise ValueError(f"{where} says {odd[0]}={config[odd[0]]!r}, which peft 0.2, that wrote the file, did not have")
    return {**config, "r": rank, "lora_alpha": said * factor}


def read_2023(path: str | Path) -> dict[str, Tensor]:
    """PEFT's name today (`base_model.model...lora_A.weight`) -> tensor, as the file has it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else than LoRA tensors, or several adapters.
    """
    path = expanded(path)
    name = path.name
    stored = _load(path)
    tensors, adapters = {}, set()
    for key, tensor in stored.items():
        match = _NAME.fullmatch(str(key))
        if match is None or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} holds {key!r} ({type(tensor).__name__}), which is no LoRA tensor: what is it from?"
            )
        _refuse_no_matrix(name, key, tensor)
        adapters.add(match["adapter"])
        tensors[f"base_model.model.{match['layer']}.{match['side']}.weight"] = tensor.detach()
    if len(adapters) > 1 or len(tensors) < len(stored):
        raise ValueError(f"{name} holds several adapters ({', '.join(sorted(map(str, adapters)))}): keep one")
    return tensors


def _refuse_no_matrix(source: str, key: str, tensor: Tensor, dim: int = 2) -> None:
    plain = tensor.dtype in FLOATS and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.dim() != dim:
        raise ValueError(
            f"{source} holds {key} as {tensor.dtype} {list(tensor.shape)}, {tensor.layout}: it must be a "
            f"{'matrix' if dim == 2 else 'vector'} of floating point numbers"
        )


def _load(path: str | Path) -> dict[Any, Any]:
    """What a file of torch.save holds: something by name, nothing that runs."""
    path = expanded(path)
    name = path.name
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can fail with any of them
        raise ValueError(
            f"{name} was not loaded: it is damaged, or holds more than tensors, and then loading it could run "
            f"anybody's code ({type(error).__name__})"
        ) from error
    if not isinstance(stored, dict) or not stored:
        raise ValueError(f"{name} holds {type(stored).__name__}, not a dict of tensors by name")
    return stored


def import_ptuning(base: nn.Module, path: str | Path) -> PeftModel:
    """The base with a published P-tuning v2 checkpoint on it, as peft's PREFIX_TUNING; `save_adapter` keeps it so.

    Args:
        base: a ChatGLM without an adapter, loaded without `pre_seq_len`, on its devices.
        path: the checkpoint's folder, or its `pytorch_model.bin`. A `config.json` beside it must agree with it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else than a prefix, not all of it, or one for another model; says which tensor.
    """
    refuse_second(base)
    path = Path(path).expanduser()
    path = path / "pytorch_model.bin" if path.is_dir() else path
    prefix = _prefix_of(_load(path), path.name)
    config: Any = base.config
    if (fits := 2 * config.num_layers * config.hidden_size) != prefix.shape[1]:
        raise ValueError(
            f"{path.name} has {prefix.shape[1]:,} numbers for each key of its prefix, this base takes {fits:,}: it "
            "belongs to another model"
        )
    if (path.parent / "config.json").is_file():
        said = read_json(path.parent, "config.json").get("pre_seq_len")
        if said not in (None, len(prefix)):
            raise ValueError(f"config.json says pre_seq_len={said!r}, {path.name} has {len(prefix)} keys: which is it?")
    return adapter_from(base, prefix_config(len(prefix)), {PREFIX: prefix}, path.name).eval()


def _prefix_of(stored: dict[Any, Any], source: str) -> Tensor:
    """[P, layers * 2 * H] float32, computed by the network if there is one."""
    start = "transformer.prefix_encoder."
    network = [f"trans.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]
    parts = {str(key).removeprefix(start): tensor for key, tensor in stored.items() if str(key).startswith(start)}
    if other := [key for key in stored if not str(key).startswith(start)]:
        raise ValueError(
            f"{source} holds {other[0]!r}, which is no part of a prefix ({start}*): a checkpoint of the whole model is "
            "loaded with from_pretrained"
        )
    wanted = ["embedding.weight", *(network if len(parts) > 1 else [])]
    if set(parts) != set(wanted):
        odd = sorted(set(parts) ^ set(wanted))[0]
        raise ValueError(f"{source} {'holds' if odd in parts else 'lacks'} {start}{odd}: it was not written whole")
    for key, tensor in parts.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{source} holds {start}{key} as {type(tensor).__name__}, no tensor")
        _refuse_no_matrix(source, start + key, tensor, 1 if key.endswith("bias") else 2)
    embedding, *rest = (parts[key].detach().float() for key in wanted)
    if not rest:
        return embedding
    try:
        return F.linear(F.linear(embedding, *rest[:2]).tanh(), *rest[2:])
    except RuntimeError as error:
        raise ValueError(f"{source}: the parts of its prefix do not fit together ({error})") from error


def _as_ordinary(tensors: dict[str, Tensor], base: nn.Module, source: str) -> tuple[dict[str, Tensor], int, int]:
    """(tensors of an ordinary adapter, its rank, factor for alpha); see the module's docstring for the other form."""
    modules, ranks, ordinary = dict(base.named_modules()), set(), {}
    for key in sorted(key for key in tensors if key.endswith("lora_A.weight")):
        stem = key.removesuffix("lora_A.weight")
        layer = modules.get(stem.removeprefix("base_model.model.").rstrip("."))
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{source} holds {key}, but this base has no linear layer there")
        a, b = tensors[key], tensors.get(f"{stem}lora_B.weight")
        if b is None:
            raise ValueError(f"{source} holds {key} but no lora_B for it: it was not written to its end")
        merged = a.dim() == b.dim() == 2 and len(a) == 2 * b.shape[1] and 3 * len(b) == 2 * layer.out_features
        ranks.add((len(a), 2 if merged else 1))
        ordinary[key], ordinary[f"{stem}lora_B.weight"] = a, _spread(b) if merged else b
    if left := sorted(set(tensors) - set(ordinary)):
        raise ValueError(f"{source} holds {left[0]} but no lora_A for it: it was not written to its end")
    if len(ranks) > 1:
        raise ValueError(
            f"{source} mixes ranks ({sorted(rank for rank, _ in ranks)}): import knows one rank for all layers"
        )
    ((rank, factor),) = ranks
    return ordinary, rank, factor


def _spread(b: Tensor) -> Tensor:
    """B of the two trained thirds, [2/3 out, r] -> [out, 2r], zero where nothing was trained."""
    third, rank = len(b) // 2, b.shape[1]
    whole = b.new_zeros(3 * third, 2 * rank)
    whole[:third, :rank] = b[:third]
    whole[2 * third :, rank:] = b[third:]
    return whole
