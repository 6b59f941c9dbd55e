"""One training step cut into micro-batches (GPipe fill-drain), so that every GPU of the split has work to do.

    naive     GPU 0  [forward       ]                                [backward      ]
              GPU 1                  [forward       ][backward      ]

    4 parts   GPU 0  [1][2][3][4]            [4 ][3 ][2 ][1 ]
              GPU 1     [1][2][3][4][4 ][3 ][2 ][1 ]

All micro-batches run forward before one backward pass over the sum of their losses. No scheduler is needed: CUDA
calls return at once, so the CPU queues the work of both GPUs far ahead, and autograd runs one thread per GPU. For that
to hold, nothing in between may ask a GPU for a number: labels are looked at while they are still on the CPU.

What is left is that a copy between two GPUs waits for everything that is queued on *either*, and holds up whatever is
queued behind it on both. Behind a micro-batch's last stage such a copy would keep GPU 0 from starting the next one:

    hidden states between stages    cannot be helped, and do no harm: GPU 1 is at the micro-batch before
    labels, and the loss back       labels go from the CPU straight to the head; losses are summed there, one copy
    look-up in a tied embedding     on the last GPU: the whole batch is looked up before the first micro-batch
    CUDA's default stream           has other people's work in it: the step has a stream of its own on each GPU

The loss of a part is its *sum* over labels divided by the labels of the whole batch, so the result does not depend on
how the batch is cut.

With `in_flight` = w there are w lanes: in each one micro-batch at a time, forward and at once back, in streams of the
lane's own. So w of them are in memory, not all. One lane keeps each GPU of R busy an R-th of the time; R lanes fill
them, for work in different streams of a GPU does not wait for each other:

    GPU 0  lane 1  [1]       [1 ][3]       [3 ][5]       the host calls F1 F2 B1 F3 B2 F4 B3 ...
           lane 2     [2]           [2 ][4]       [4 ]
    GPU 1  lane 1     [1][1 ]       [3][3 ]       [5]    a lane's turn takes 2 (f + b), in which
           lane 2            [2][2 ]       [4][4 ]       each GPU works f + b for each of two lanes

Nothing that one lane makes is read in another before all have met: a part's inputs are looked up and copied in its own
lane, and its loss only kept. Gradients add up in one stream of each GPU; autograd lets that one wait for each lane.
"""

import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmhelpers.cost_model.sizes import padded_length
from glmhelpers.devicemap.captured import Captured, fits_graphs
from glmhelpers.devicemap.devices import first_device, head_device, own_streams, place_part, to_device
from glmhelpers.inference.model_state import peft_prefix
from glmhelpers.utils.types import Model
from thuglm.constants import IGNORE_INDEX


def target_rows(labels: Tensor) -> Tensor:
    """Flat indices of the labelled targets `labels[:, 1:]`, [N] int64, for labels [B, L] on the CPU."""
    return (labels[:, 1:].reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)


def split_batch(batch: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Cut a batch into `parts` micro-batches of equal or nearly equal numbers of rows.

    Parts without a single label are left out: their loss is 0, and so is its gradient. `labels` are on the CPU.

    Raises:
        ValueError: more parts than rows, labels on a GPU, or no label in the whole batch.
    """
    rows = batch["labels"].shape[0]
    if not 1 <= parts <= rows:
        raise ValueError(f"cannot cut a batch of {rows} rows into {parts} micro-batches: use 1 to {rows}")
    if batch["labels"].device.type != "cpu":
        raise ValueError(
            f"labels are on {batch['labels'].device}: leave the batch on the CPU, so that counting labels does not "
            "wait for the GPU (Trainer: accelerator.device_placement = False)"
        )
    pieces = {key: value.tensor_split(parts) for key, value in batch.items() if value.dim() and len(value) == rows}
    cut = []
    for number in range(parts):
        part = {key: value[number] for key, value in pieces.items()}
        part["target_rows"] = target_rows(part["labels"])
        if len(part["target_rows"]):
            cut.append(part)
    if not cut:
        raise ValueError(
            f"a batch of {rows} rows has no label: every entry of labels[:, 1:] is {IGNORE_INDEX}. Were the answers "
            "cut off by a length limit?"
        )
    return cut


def pad_part(part: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """A micro-batch, [B, L] on the CPU, with padding behind every row that nobody sees and nothing is learnt from."""
    more = length - part["labels"].shape[1]
    fill = {"labels": IGNORE_INDEX, "attention_mask": 0}
    whole = {"attention_mask": torch.ones_like(part["input_ids"]), **part}
    padded = {name: F.pad(x, (0, more), value=fill.get(name, 0)) for name, x in whole.items() if x.dim() == 2}
    return {**whole, **padded, "target_rows": target_rows(padded["labels"])}


def run_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    micro_batches: int = 1,
    device: torch.device | str | None = None,
    num_items: int | Tensor | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    captured: Captured | None = None,
    in_flight: int | None = None,
    **forward: Any,
) -> Tensor:
    """Forward and backward of every micro-batch; gradients are added to `.grad`.

    Args:
        model: a ChatGLM, split or whole, with an adapter or without.
        batch: `input_ids`, `labels` and perhaps `attention_mask`, [B, L], on the CPU.
        micro_batches: parts; equal results for any number.
        device: where ids and masks go; by default the device of the first block. Labels go to the head's.
        num_items: labels to divide by; by default those of this batch (pass the accumulated number to accumulate).
        backward: called with the loss, for a GradScaler: `lambda loss: scaler.scale(loss).backward()`; with `in_flight`
            once for each micro-batch, with its share of the loss.
        captured: the stages as CUDA graphs; short micro-batches are then padded to one of a few lengths, whether or not
            they can be recorded. Where the memory runs out, the step is done again without, and so are all others.
        in_flight: micro-batches in memory at a time, as many as there are GPUs; by default all of them: one
            backward over the sum. So it is with a learnt prefix, which all share, and with those that are recorded.
        forward: more arguments of the model's forward, such as `loss_chunk`.

    Returns:
        The loss, float32 scalar on `device` without gradient; on a GPU still on its way: `.item()` waits for the step.

    Raises:
        ValueError: see `split_batch`.
    """
    parts = split_batch(batch, micro_batches)
    if num_items is None:
        num_items = sum(len(part["target_rows"]) for part in parts)
    device = torch.device(device or first_device(model))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if isinstance(num_items, Tensor):
        num_items = num_items.to(head_device(model) or device)
    shapes = [(len(part["labels"]), padded_length(part["labels"].shape[1])) for part in parts]
    if captured is None or not fits_graphs(shapes):
        return run_parts(model, parts, device, backward, in_flight, num_items_in_batch=num_items, **forward)
    parts = [pad_part(part, length) for part, (_, length) in zip(parts, shapes, strict=True)]
    try:
        with captured.step(shapes) as take_back:
            return run_parts(model, parts, device, backward, num_items_in_batch=num_items, **forward)
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        if not captured.give_up():
            raise
    take_back()
    return run_parts(model, parts, device, backward, in_flight, num_items_in_batch=num_items, **forward)


def run_parts(
    model: nn.Module,
    parts: list[dict[str, Tensor]],
    device: torch.device,
    backward: Callable[[Tensor], Any],
    in_flight: int | None = None,
    **forward: Any,
) -> Tensor:
    """The step for these micro-batches, on the CPU: forward of each, one backward; the loss, see `run_step`."""
    if in_flight is not None and in_flight < len(parts) and not peft_prefix(model):
        return run_lanes(model, parts, device, backward, in_flight, **forward)
    losses = []
    with own_streams(model):
        called, before = behind_prefix(model)
        looked_up = look_up(model, parts, device)
        for part in parts:
            placed = place_part(model, part, device)
            if looked_up:
                placed["inputs_embeds"] = looked_up.pop(0)
            losses.append(called(**placed, use_cache=False, return_logits=False, **before, **forward).loss)
        # Or the last part's embeddings would live as long as the backward pass.
        del placed
        total = torch.stack(losses).sum().to(device)
        backward(total)
    return total.detach()


def run_lanes(
    model: nn.Module,
    parts: list[dict[str, Tensor]],
    device: torch.device,
    backward: Callable[[Tensor], Any],
    lanes: int,
    **forward: Any,
) -> Tensor:
    """The same with so many micro-batches in flight; see the module."""
    flying, losses = deque[tuple[int, Tensor]](), []
    with own_streams(model, lanes) as own:

        def land() -> None:
            lane, loss = flying.popleft()
            own.enter(lane)
            backward(loss)

        for number, part in enumerate(parts):
            if number >= lanes:
                land()
            if number == lanes:  # the first call may have made what all others read, such as the scale of a GradScaler
                own.wait_for(own.streams[0])
            own.enter(number % lanes)
            placed = place_part(model, part, device)
            if looked_up := look_up(model, [part], device):
                placed["inputs_embeds"] = looked_up.pop()
            loss = model(**placed, use_cache=False, return_logits=False, **forward).loss
            del placed
            flying.append((number % lanes, loss))
            losses.append(loss.detach())
            del loss
        while flying:
            land()
    return torch.stack(losses).sum().to(device)


def behind_prefix(model: Model) -> tuple[Model, dict[str, Any]]:
    """What to call for each micro-batch, and with what besides its rows: a learnt prefix is made once for all of them,
    and sent to the other GPUs before they have work to do."""
    prefix = peft_prefix(model)
    return (model.get_base_model(), {"prefix": prefix}) if prefix else (model, {})


def look_up(model: Model, parts: list[dict[str, Tensor]], device: torch.device) -> list[Tensor]:
    """Embeddings of every micro-batch, [B, L, H] on `device`; none if the embedding lies there itself."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None or embedding.weight.device == device:
        return []
    home = embedding.weight.device
    with torch.no_grad():
        return [to_device(embedding(to_device(part["input_ids"], home)), device) for part in parts]
