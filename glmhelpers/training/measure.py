"""What a training step really holds, to be laid beside the prediction.

random ids -> forward (each micro-batch) -> one backward -> Adam step -> torch.cuda.max_memory_allocated
a line of benchmarks/results/ -> predict_case -> the bytes that the formula says today
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from glmhelpers.cost_model.step_memory import predict
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.check import part_names
from glmhelpers.lora.layer import fuse_lora
from glmhelpers.training.pipeline import run_step
from glmhelpers.utils.types import Model


def parameter_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of all parameters on each device ("cuda:0", "cpu", ...); a tensor used twice counts once."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        place = str(parameter.device)
        sizes[place] = sizes.get(place, 0) + parameter.numel() * parameter.element_size()
    return sizes


def random_batch(config: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Ids [rows, length] of which the second half is the answer, and labels for the answer (-100 elsewhere)."""
    ids = torch.randint(10, min(1000, config.vocab_size), (rows, length))
    ids[:, length // 2 - 2] = config.gmask_token_id
    ids[:, length // 2 - 1] = config.bos_token_id
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "labels": labels}


def predict_case(config: Any, case: Mapping[str, Any]) -> int:
    """Peak in bytes that the formula gives today for a line of benchmarks/results/train_step_*.jsonl, on an H100; see
    `forecast_case`."""
    return forecast_case(config, case)[0]


def forecast_case(config: Any, case: Mapping[str, Any], dtype: str = "float16") -> tuple[int, str]:
    """Peak in bytes of a case of benchmarks/train_step.py on an H100, and the moment at which it is reached.

    Args:
        config: of the model.
        case: the line; read are gpus, stage, cut, batch, length, micro_batches, checkpointed ("all", "half", "none" or
            a list of blocks), embedding ("first" or "tied"), lora ("fused" or "peft"), loss_chunk and label_share.
    """
    homes = [gpu for gpu, count in enumerate(case["cut"]) for _ in range(count)]
    last, stage = len(case["cut"]) - 1, case.get("stage") or 0
    places = [last if case["embedding"] == "tied" else 0, *homes, last, last]
    half = list(range(config.num_layers // 2))
    forecast = predict(
        config,
        dict(zip(part_names(config.num_layers), places, strict=True)),
        case["batch"],
        case["length"],
        checkpointed=half if case["checkpointed"] == "half" else case["checkpointed"],
        gpus=["H100"] * (last + 1),
        micro_batches=case["micro_batches"],
        lora_fused=case["lora"] == "fused",
        loss_chunk=case["loss_chunk"],
        label_share=case["label_share"],
        dtype=dtype,
    )
    at = list(forecast.devices).index(stage)
    return forecast.peak_bytes[at], forecast.moments[at]


def prepare(model: Model, layers: Iterable[int] | None = None, fused: bool = True) -> nn.Module:
    """The model in training mode with LoRA (rank 8 on query_key_value), these blocks checkpointed (None: all).

    `fused`: the LoRA layer of `glmhelpers.lora.layer`; otherwise peft's.
    """
    blocks = range(model.config.num_layers) if layers is None else layers
    adapter = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["query_key_value"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(model, adapter).train()
    if fused:
        fuse_lora(model)
    # After peft, which asks for gradients of the embeddings of a model that is already checkpointed.
    checkpoint_only(model, blocks)
    return model


def measured_peaks(model: nn.Module, config: Any, rows: int, length: int) -> list[int]:
    """Run two training steps on random ids; return the peak of each GPU in bytes during the second, [] without a GPU.

    Args:
        model: a frozen model at its places; it gets an adapter, see `prepare`.
        config: its configuration.
        rows: rows in a step; half of each row's tokens are labelled, see `random_batch`.
        length: tokens in a row.
    """
    model = prepare(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    devices = range(torch.cuda.device_count())
    for _ in range(2):
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        run_step(model, random_batch(config, rows, length))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [torch.cuda.max_memory_allocated(device) for device in devices]
