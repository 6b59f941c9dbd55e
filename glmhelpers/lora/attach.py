"""LoRA attached to a model, counted and checked.

LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) leaves each chosen matrix W alone and learns a small correction

    x ──┬──► W (frozen, fp16) ──────────────► + ──► y          y = W x + (alpha / r) * B (A x)
        │                                     │
        └──► A [r, in] ──► B [out, r] ── alpha / r             A: random;  B: zero, so training starts from the base
             random        zero
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
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from glmhelpers.cost_model.sizes import as_targets
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
    """Raise a ValueError if the model has an adapter already."""
    if adapter_layers(model):
        raise ValueError(
            "This model has an adapter already, and a second one would be put around it. Load the base again, then "
            "attach or load the adapter that you want."
        )


def _adapted(model: nn.Module, config: LoraConfig) -> PeftModel:
    refuse_second(model)
    with quiet_peft():
        adapted = get_peft_model(model, config)
    fuse_lora(adapted)
    check_adapter(adapted)
    return adapted


def adapter_from(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], source: str) -> PeftModel:
    """The model with an adapter that holds these tensors: all of them, and nothing else.

    Args:
        model: a ChatGLM without an adapter, on its devices. Without an adapter again if the tensors do not fit.
        config: rank, alpha and targets.
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
    """Assert what training relies on: adapters are float32, and lie on the device of their base layer.

    Raises:
        RuntimeError: names the first layer that breaks the rule, or says that there is no adapter.
    """
    layers = adapter_layers(model)
    if not layers:
        raise RuntimeError("The model has no LoRA layer: call attach_lora, or load an adapter, first.")
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
    """Name as in PEFT's files (`...query_key_value.lora_A.weight`, no adapter's name in it) -> parameter."""
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


def lora_b_norms(model: nn.Module) -> dict[str, float]:
    """Layer name -> Frobenius norm of its lora_B; 0 before training, since B starts at 0."""
    return {
        name: layer.lora_B[active].weight.detach().norm().item()
        for name, layer in adapter_layers(model).items()
        for active in layer.active_adapters
    }
