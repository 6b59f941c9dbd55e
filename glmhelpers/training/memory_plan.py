"""What fits on the GPUs of this machine: a plan before training, an explanation if the memory runs out all the same.

run.plan(config, batch, length) ──► device map, micro-batches, blocks to checkpoint, loss chunk
                                          │
"CUDA out of memory. GPU 1 has ..." ──► explain_out_of_memory: which GPU, predicted and measured for this batch,
                                        who else uses the card, the nearest plan that fits
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from glmhelpers.cost_model.gpus import gpus_here, known_gpu
from glmhelpers.cost_model.sizes import Setting
from glmhelpers.cost_model.step_memory import Prediction, predict
from glmhelpers.devicemap.plan import DoesNotFit, Plan, plan_device_map
from glmhelpers.lora.fingerprint import base_bits
from glmhelpers.utils.environment import free_ram_bytes
from glmhelpers.utils.types import Model
from glmhelpers.utils.units import GIB

_WHICH = re.compile(r"GPU (\d+) has a total capacity")

_OF_THE_MODEL = (
    *("lora_rank", "lora_targets", "lora_dropout", "prefix_length", "prefix_projection"),
    *("dtype", "base_bits"),
)
"""Fields of a Setting that another plan must keep."""

OWN_CONTEXT = GIB // 2
"""Bytes of a card in use, beside this process' tensors, that may be its own CUDA context: not other processes'."""


@dataclass(frozen=True)
class CardState:
    """One GPU when the memory ran out; bytes."""

    index: int
    name: str
    total: int
    peak: int
    """Most that was in tensors at one time."""
    others: int = 0
    """What other processes hold, and the driver."""


def refuse_plan(plan: Plan, model: PeftModel, batch_size: int) -> None:
    """Refuse a plan that was made for another model, adapter or batch.

    Raises:
        ValueError: says what the plan is for and what is here.
    """
    here = {"batch_size": batch_size, **model_settings(model)}
    planned = {name: getattr(plan.setting, name) for name in here}
    if "lora_targets" in here:
        planned["lora_targets"] = tuple(sorted(planned["lora_targets"]))
    planned["base_bits"] = min(planned["base_bits"], 16)  # 32 bits are the base's own dtype too
    if wrong := [
        f"{name} is {planned[name]!r} in the plan and {here[name]!r} here"
        for name in here
        if planned[name] != here[name]
    ]:
        raise ValueError(f"this plan belongs to another training: {'; '.join(wrong)}. Plan again, as in run.plan(...)")


def predict_training(
    model: PeftModel, batch_size: int, seq_length: int, micro_batches: int = 1, **settings: Any
) -> Prediction:
    """What each device will hold while this very model is trained: its placement, adapter, dtype, checkpointed blocks.

    Args:
        model: a PeftModel on its devices.
        batch_size: rows in a batch; if they cannot be cut evenly, the next larger number that can.
        seq_length: tokens in the longest row.
        micro_batches: parts of the batch.
        settings: more fields of `sizes.Setting`, such as loss_chunk and in_flight.
    """
    whole = -(-batch_size // micro_batches) * micro_batches
    gpus = gpus_here()
    how = {"checkpointed": checkpointed(model), "micro_batches": micro_batches, **model_settings(model), **settings}
    return predict(model.config, model, whole, seq_length, gpus=gpus or None, **how)


def explain_out_of_memory(trainer: Any, error: str) -> str:
    """What to tell somebody whose training (a GLMTrainer) has just run out of memory with this message."""
    model, (rows, length) = trainer.model, trainer.batch_shape
    parts = min(trainer.micro_batches, max(rows, 1))
    flying = trainer.in_flight and min(trainer.in_flight, parts)
    now = predict_training(model, max(rows, 1), max(length, 8), parts, in_flight=flying, **trainer.forward)
    where = f"step {trainer.state.global_step + 1}, a batch of {rows} x {length} tokens in {parts} micro-batches"
    cards = card_states()
    if not cards or (now.devices == ("cpu",) and not _WHICH.search(error)):
        one = predict_training(model, 1, max(length, 8), **trainer.forward)
        return describe_without_gpu(where, free_ram_bytes(), now.peak_bytes[0], one.peak_bytes[0])
    return describe(error, where, cards, model.config, now)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host: for the latter torch has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def describe_without_gpu(where: str, free: int, needed: int, one_row: int) -> str:
    """The text of `explain_out_of_memory` for a model on the CPU.

    Args:
        where: step and batch.
        free: bytes of host memory that are free now.
        needed: predicted peak of the batch, weights included.
        one_row: the same of a batch of one row.
    """
    return (
        f"This machine's memory ran out in {where}: {free / GIB:.2f} GiB are free now; predicted for this batch, with "
        f"the weights, {needed / GIB:.2f} GiB, for one row {one_row / GIB:.2f}. Stop other programs, or train on fewer "
        "rows a batch (gradient_accumulation_steps makes up for the rest) or on shorter rows (encode_file's max_length)"
    )


def describe(error: str, where: str, cards: list[CardState], config: Any, now: Prediction) -> str:
    """The text of `explain_out_of_memory`, from facts alone: `now` is the prediction for the batch that failed."""
    found = _WHICH.search(error)
    culprit = next((card for card in cards if found and card.index == int(found[1])), None)
    lines = [f"{f'GPU {culprit.index} ({culprit.name})' if culprit else 'A GPU'} ran out of memory in {where}."]
    lines += [_card_line(card, now) for card in cards]
    # Where the prediction said that it fits, only the most careful plan is worth a try.
    predicted = dict(zip(now.devices, now.total_bytes, strict=True))
    fits = all(predicted.get(card.index, 0) <= card.total for card in cards)
    lines.append(_way_out(cards, config, now.setting, "memory" if fits else "speed"))
    return "\n".join(lines)


def _card_line(card: CardState, now: Prediction) -> str:
    text = f"  GPU {card.index}: measured peak of tensors {card.peak / GIB:.2f} GiB"
    if card.index in now.devices:
        at = now.devices.index(card.index)
        text += (
            f", predicted {now.peak_bytes[at] / GIB:.2f}, with slack and context {now.total_bytes[at] / GIB:.2f}"
            f" of {card.total / GIB:.2f} GiB"
        )
    else:
        text += f" of {card.total / GIB:.2f} GiB, nothing predicted: no part of the model is there"
    if card.others > GIB // 4:
        text += f"; {card.others / GIB:.2f} GiB are held by other processes (nvidia-smi): stop them"
    return text


def _way_out(cards: list[CardState], config: Any, setting: Setting, objective: str) -> str:
    """The nearest plan that fits: for the same batch if there is one, else with the smallest change that helps."""
    wanted = {name: getattr(setting, name) for name in _OF_THE_MODEL}
    wanted |= {"gpus": [known_gpu(card.name, card.total) for card in cards], "reserve": [card.others for card in cards]}
    wanted |= {"seq_length": setting.seq_length, "objective": objective}
    try:
        plan = plan_device_map(config, batch_size=setting.batch_size, **wanted)
        change = "The nearest plan that fits this batch"
    except DoesNotFit as refusal:
        if "batch_size" not in refusal.changes:
            return f"No plan fits this batch: {refusal}"
        smaller = refusal.changes["batch_size"]
        plan = plan_device_map(config, batch_size=smaller, **wanted)
        change = (
            f"No plan fits this batch. The nearest that fits has {smaller} rows a batch "
            "(gradient_accumulation_steps makes up for the rest)"
        )
    told = {name: wanted[name] for name in _OF_THE_MODEL if wanted[name] != getattr(Setting, name)}
    told |= {"reserve": wanted["reserve"]} if max(wanted["reserve"], default=0) > GIB // 4 else {}
    more = "".join(f", {name}={value!r}" for name, value in {"objective": objective, **told}.items())
    call = f"run.plan(config, {plan.setting.batch_size}, {setting.seq_length}{more})"
    return (
        f"{change}:\n{plan}\nTo use it: plan = {call}; load the model again with device_map=plan.device_map, "
        "attach_lora, train(..., plan=plan), which applies it and takes "
        f"micro_batches={plan.micro_batches}, loss_chunk={plan.setting.loss_chunk}, "
        f"in_flight={plan.setting.in_flight} from it."
    )


def card_states() -> list[CardState]:
    """Every GPU now."""
    states = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        others = max(0, total - free - torch.cuda.memory_reserved(index) - OWN_CONTEXT)
        peak = torch.cuda.max_memory_allocated(index)
        states.append(CardState(index, torch.cuda.get_device_name(index), total, peak, others))
    return states


def model_settings(model: Model) -> dict[str, Any]:
    """The fields of `sizes.Setting` that a PeftModel itself decides: LoRA or prefix, dtype, bits of the base."""
    adapter = model.peft_config[model.active_adapter]
    norm = next(parameter for name, parameter in model.named_parameters() if "input_layernorm" in name)
    if adapter.peft_type == "PREFIX_TUNING":
        middle = adapter.encoder_hidden_size if adapter.prefix_projection else 0
        trained = {"lora_rank": 0, "prefix_length": adapter.num_virtual_tokens, "prefix_projection": middle}
    else:
        trained = {
            "lora_rank": adapter.r,
            "lora_targets": tuple(sorted(adapter.target_modules)),
            "lora_dropout": adapter.lora_dropout,
        }
    return {
        **trained,
        "dtype": str(norm.dtype).removeprefix("torch."),
        "base_bits": base_bits(model),
    }


def checkpointed(model: Model) -> list[int]:
    """Indices of the blocks that are run again in the backward pass."""
    blocks = model.get_base_model().transformer.layers
    return [index for index, block in enumerate(blocks) if block.gradient_checkpointing]
