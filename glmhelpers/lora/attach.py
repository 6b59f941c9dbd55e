"""LoRA, or the learnt prefix of P-tuning v2, attached to a model, counted and checked.

LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) leaves each chosen matrix W alone and learns a small correction

    x ──┬──► W (frozen, fp16) ──────────────► + ──► y          y = W x + (alpha / r) * B (A x)
        │                                     │
        └──► A [r, in] ──► B [out, r] ── alpha / r             A: random;  B: zero, so training starts from the base
             random        zero

P-tuning v2 (drawn in `thuglm.prefix_encoder`) leaves all matrices alone, and learns keys and values that stand in front
of every prompt. It starts from random ones, so not from the base.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

from glmhelpers.cost_model.sizes import as_targets
from glmhelpers.devicemap.devices import first_device
from glmhelpers.lora.layer import fuse_lora


@dataclass
class Origin:
    """Where the adapter of a model comes from: part of what makes a training run this run and no other.

    Attributes:
        starts_from: in words: fresh with its seed, loaded, or trained before.
        digest: of the weights then (`weights_digest`); another one now means that somebody changed them.
        run: the folder of the run that trained it since, if one did.
    """

    starts_from: str = "unknown"
    digest: str = ""
    run: Path | None = None


PREFIX = "prompt_embeddings"
"""Name of the one tensor of a prefix in PEFT's files."""

_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def origin_of(model: nn.Module) -> Origin:
    """The origin of this model's adapter; unknown for one that was not attached here."""
    return _ORIGINS.setdefault(model, Origin())


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide one FutureWarning: peft 0.21 reads a property that transformers has renamed. Nobody here can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def attach_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 32,
    dropout: float = 0.1,
    targets: tuple[str, ...] = ("query_key_value",),
    seed: int = 0,
) -> PeftModel:
    """Put LoRA matrices beside the targets of every block and freeze all else.

    Args:
        model: a ChatGLM, already on its devices: each adapter is made on the device of its base layer.
        r: rank; each target [out, in] gets r * (in + out) parameters.
        alpha: the correction is multiplied by alpha / r.
        dropout: share of the inputs of A that is dropped while training.
        targets: names of the linear layers.
        seed: for the random A.

    Raises:
        ValueError: the model has an adapter already; or (from peft) it does not have a target.
        RuntimeError: an adapter is not float32, or not on the device of its base layer.
    """
    torch.manual_seed(seed)
    adapted = _adapted(model, lora_config(r, alpha, dropout, targets))
    _ORIGINS[adapted] = Origin(f"fresh, seed {seed}", weights_digest(adapted))
    return adapted


def attach_prefix(
    model: nn.Module, length: int = 128, projection: bool = False, width: int | None = None, seed: int = 0
) -> PeftModel:
    """Put a learnt prefix in front of every prompt (P-tuning v2, by peft) and freeze all else.

    Args:
        model: a ChatGLM, already on its devices; the prefix is made on the device of block 0.
        length: keys and values in each block; as the authors of ChatGLM trained it, 128.
        projection: they come out of a small network, which is trained instead: as large as some blocks of the model.
        width: of that network's middle; by default the model's.
        seed: for the random start.

    Raises:
        ValueError: the model has an adapter or a prefix already, or the length is not 1 or more.
    """
    if length < 1:
        raise ValueError(f"length is {length}: a prefix has 1 key or more")
    torch.manual_seed(seed)
    adapted = _adapted(model, prefix_config(length, projection=projection, width=width))
    _ORIGINS[adapted] = Origin(f"fresh, seed {seed}", weights_digest(adapted))
    return adapted


def prefix_config(length: int, **how: Any) -> PrefixTuningConfig:
    """Arguments as in `attach_prefix`; peft takes the sizes from the model. `inference_mode`: to use, not to train."""
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prefix_projection=how.get("projection", False),
        encoder_hidden_size=cast(int, how.get("width")),  # peft takes None, for the model's width
        inference_mode=how.get("inference_mode", False),
    )


def prefix_encoder(model: nn.Module) -> Any | None:
    """The module that holds peft's learnt prefix; None for a model without one."""
    if not isinstance(model, PeftModel) or model.active_peft_config.peft_type != "PREFIX_TUNING":
        return None
    return model.prompt_encoder[model.active_adapter]


def bring_prefix_home(model: nn.Module) -> None:
    """Move a learnt prefix to the device of block 0: peft puts it beside the embedding, which may be the last GPU."""
    if (encoder := prefix_encoder(model)) is not None:
        encoder.to(first_device(model))


def lora_config(r: int, alpha: float, dropout: float, targets: tuple[str, ...]) -> LoraConfig:
    """Arguments as in `attach_lora`."""
    return LoraConfig(
        r=r,
        lora_alpha=cast(int, alpha),  # peft takes any number
        lora_dropout=dropout,
        target_modules=list(as_targets(targets)),
        bias="none",
        task_type="CAUSAL_LM",
    )


def refuse_second(model: nn.Module) -> None:
    """Raise a ValueError if the model has an adapter, or a learnt prefix, already."""
    if getattr(getattr(model, "config", None), "pre_seq_len", None):
        raise ValueError(
            "This model was loaded with a prefix of its own (pre_seq_len in its configuration). Load the base without "
            "it; import_ptuning(base, folder) then puts the published prefix on as an adapter."
        )
    if adapter_layers(model) or isinstance(model, PeftModel):
        raise ValueError(
            "This model has an adapter already, and a second one would be put around it. Load the base again, then "
            "attach or load the adapter that you want."
        )


def _adapted(model: nn.Module, config: LoraConfig | PrefixTuningConfig) -> PeftModel:
    refuse_second(model)
    # peft refuses a prefix where blocks are checkpointed, since a block that is run again would fill a cache twice.
    # Here its keys are arguments of the blocks.
    marked: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    with quiet_peft():
        try:
            for module in marked if isinstance(config, PrefixTuningConfig) else ():
                module.gradient_checkpointing = False
            adapted = get_peft_model(cast(Any, model), config)
        finally:
            for module in marked:
                module.gradient_checkpointing = True
    fuse_lora(adapted)
    bring_prefix_home(adapted)
    if (encoder := prefix_encoder(adapted)) is not None and config.inference_mode:
        encoder.requires_grad_(False)
    check_adapter(adapted)
    return adapted


def adapter_from(
    model: nn.Module, config: LoraConfig | PrefixTuningConfig, tensors: Mapping[str, Tensor], source: str
) -> PeftModel:
    """The model with an adapter that holds these tensors: all of them, and nothing else.

    Args:
        model: a ChatGLM without an adapter, on its devices. Without an adapter again if the tensors do not fit.
        config: rank, alpha and targets; or a prefix's length.
        tensors: name as in `adapter_weights` -> tensor.
        source: where they come from, for messages.

    Raises:
        ValueError: see `fill_adapter` and `attach_lora`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    had_adapter = bool(adapter_layers(model))
    try:
        adapted = _adapted(model, config)
        fill_adapter(adapted, tensors, source)
    except Exception:
        if not had_adapter:
            _take_off(model, trained)
        raise
    digest = weights_digest(adapted)
    _ORIGINS[adapted] = Origin(f"loaded, {digest}", digest)
    return adapted


def _take_off(model: nn.Module, trained: list[nn.Parameter]) -> None:
    """Make a model what it was before peft put layers into it, perhaps not all; `trained` required a gradient."""
    for name, layer in adapter_layers(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    if hasattr(model, "peft_config"):
        del model.peft_config


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of all bits of the adapter."""
    return digest_of(adapter_weights(model).items())


def digest_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """`weights_digest` of an adapter's matrices, as (name, matrix) in the order of the model; taken as float32."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def not_a_number(model: nn.Module) -> str | None:
    """Name of the first matrix of the adapter that holds NaN or infinity; None if none does. Waits for the GPUs."""
    return next((name for name, weight in adapter_weights(model).items() if not weight.isfinite().all()), None)


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> LoRA layer, for every layer that has an adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}


def check_adapter(model: nn.Module) -> None:
    """Assert what training relies on: adapters are float32, and lie on the device of their base layer, or of block 0.

    Raises:
        RuntimeError: names the first layer that breaks the rule, or says that there is no adapter.
    """
    if (encoder := prefix_encoder(model)) is not None:
        weight, home = encoder.embedding.weight, first_device(model)
        if weight.device != home or weight.dtype != torch.float32:
            raise RuntimeError(
                f"The prefix is {weight.dtype} on {weight.device}; it must be float32, on {home} with block 0: call "
                "attach_prefix on the placed base, or load with load_adapter."
            )
        return
    layers = adapter_layers(model)
    if not layers:
        raise RuntimeError("The model has no LoRA layer and no prefix: call attach_lora, or load an adapter, first.")
    for name, layer in layers.items():
        home = layer.get_base_layer().weight.device
        for side in ("lora_A", "lora_B"):
            for key, linear in getattr(layer, side).items():
                weight = linear.weight
                if weight.device != home:
                    raise RuntimeError(
                        f"{name}.{side}.{key} lies on {weight.device}, its base layer on {home}: place the model "
                        "before the adapter is attached or loaded."
                    )
                if weight.dtype != torch.float32:
                    raise RuntimeError(
                        f"{name}.{side}.{key} is {weight.dtype}; trained parameters must be float32, or small updates "
                        "round to nothing. Call attach_lora on the base, or load with load_adapter."
                    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, all parameters), shared tensors counted once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name as in PEFT's files (`...query_key_value.lora_A.weight`, no adapter's name in it) -> parameter.

    A prefix is one matrix, `prompt_embeddings` [P, layers * 2 * H]. One that comes out of a network has the network's
    names: peft's files hold its result alone, from which nobody could train on.
    """
    if (encoder := prefix_encoder(model)) is not None:
        found = dict(encoder.named_parameters())
        return found if hasattr(encoder, "transform") else {PREFIX: found["embedding.weight"]}
    weights = {}
    for name, layer in adapter_layers(model).items():
        for side in ("lora_A", "lora_B"):
            for linear in getattr(layer, side).values():
                weights[f"{name}.{side}.weight"] = linear.weight
    return weights


@torch.no_grad()
def fill_adapter(model: nn.Module, tensors: Mapping[str, Tensor], source: str = "the file") -> None:
    """Copy tensors into the adapter of `model`, each into its place: all of them, and no place left as it was.

    Args:
        tensors: name as in `adapter_weights` -> tensor; any dtype, any device.
        source: where they come from, for messages.

    Raises:
        ValueError: a name that the adapter lacks, a place that stays empty, a shape that does not fit, or a value that
            is no number. Nothing is copied then.
    """
    places = adapter_weights(model)
    if unknown := [name for name in tensors if name not in places]:
        raise ValueError(
            f"{source} holds {unknown[0]} (and {len(unknown) - 1} more) for which this adapter has no place; it has "
            f"{len(places)} tensors such as {next(iter(places), 'none')}"
        )
    if empty := [name for name in places if name not in tensors]:
        raise ValueError(f"{source} lacks {len(empty)} of the adapter's {len(places)} tensors, the first is {empty[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != places[name].shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in {source}, but {list(places[name].shape)} in this model: another "
                "rank, or another model"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinity in {source}: its training diverged, or the file is damaged. Take an "
                "earlier checkpoint."
            )
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    check_adapter(model)


def learnt_nothing(model: nn.Module) -> str | None:
    """Why this adapter is not worth saving, or None."""
    if prefix_encoder(model) is not None:
        origin = origin_of(model)
        fresh = origin.starts_from.startswith("fresh") and origin.digest == weights_digest(model)
        return "This prefix is as random as it was attached. Train it before saving it." if fresh else None
    if any(norm > 0 for norm in lora_b_norms(model).values()):
        return None
    return "Every lora_B is 0: this adapter changes nothing. Train it before saving it."


def lora_b_norms(model: nn.Module) -> dict[str, float]:
    """Layer name -> Frobenius norm of its lora_B; 0 before training, since B starts at 0."""
    return {
        name: layer.lora_B[active].weight.detach().norm().item()
        for name, layer in adapter_layers(model).items()
        for active in layer.active_adapters
    }
