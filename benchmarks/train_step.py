"""Milliseconds and peak memory of one LoRA training step, measured beside the prediction.

    python benchmarks/train_step.py --gpus 1 --batch 4 --length 1024                the whole model on one GPU
    python benchmarks/train_step.py --gpus 2 --stage 0 --batch 4 --length 1024      stage 0 of a 2-GPU split, alone
    python benchmarks/train_step.py --suite memory                                  the table of notebook 03
    python benchmarks/train_step.py --suite planned                                 the planner's choice, stage by stage
    python benchmarks/train_step.py --tiny                                          a small model on the CPU

    whole model        ids ─► embedding ─► blocks ─► head, loss ─► backward ─► Adam
    stage 0 of 2       hidden states made up ─► blocks 0..k ─► "sent": a gradient comes back, made up too
    last stage of 2    hidden states made up, with gradient ─► blocks ─► head, loss

A stage alone on one GPU holds and computes what it would in the split, so that a split can be measured where there is
only one GPU; only the copies between GPUs are missing. Weights are random, full-size and frozen in float16; LoRA (r = 8
on query_key_value, dropout 0.1) is float32. A step is all that the Trainer does: micro-batches, GradScaler, clipping,
fused AdamW (a GPU's default), which unlike the plain one does not wait for the GPU to learn whether a gradient is
infinite. One JSON line each: `ms` is the median step, `peak_bytes` is torch.cuda.max_memory_allocated,
`predicted_peak_bytes` is glmhelpers.memory's. Attention runs on the memory-efficient kernel, the one that a T4 has,
unless `--attention any` lets PyTorch choose.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glmhelpers.cost_model.stages import is_checkpointed
from glmhelpers.devicemap.check import part_names
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.training.measure import forecast_case, prepare
from glmhelpers.training.pipeline import run_step
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

ANY = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Case:
    """One measurement. `cut`: blocks on each GPU, None for the planner's memory plan; `stage`: None for the whole."""

    gpus: int = 1
    stage: int | None = None
    batch: int = 4
    length: int = 1024
    micro_batches: int = 1
    checkpointed: str | tuple[int, ...] = "all"
    embedding: str = "tied"
    cut: tuple[int, ...] | None = None
    lora: str = "fused"
    loss_chunk: int = 512
    label_share: float = 1.0
    attention: str = "efficient"


class _Send(torch.autograd.Function):
    """The end of a stage that is not the last: the hidden states leave, a gradient comes back later."""

    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        ctx.like = hidden.shape, hidden.dtype, hidden.device
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=1e-3)


class _SendHidden(nn.Module):
    """Stands where the final LayerNorm would, in a stage that has none."""

    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return _Send.apply(hidden)


class StageModel(nn.Module):
    """Some blocks of a ChatGLM with random weights, alone on one device, with the forward that `run_step` calls."""

    def __init__(self, config, blocks: range, embedding: bool, head: bool, dtype, device):
        super().__init__()
        with torch.device("meta"):
            model = ChatGLMForConditionalGeneration(replace_layers(config, len(blocks)))
        self.config, self.head = model.config, head
        self.receives = None if embedding else blocks.start > 0
        self.dtype, self.hidden_size = dtype, config.hidden_size
        if not head:
            model.lm_head = None
        if not embedding:
            model.transformer.word_embeddings = None
        model.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0) if name.endswith("layernorm.weight") else parameter.normal_(std=0.02)
            rotary = model.transformer.rotary_emb
            rotary.inv_freq = rotary.frequencies().to(device)
        if not head:
            model.transformer.final_layernorm = _SendHidden(device)
        elif embedding and config.tie_word_embeddings:
            model.lm_head.weight = model.transformer.word_embeddings.weight
        self.model = model.requires_grad_(False)

    def forward(self, input_ids: Tensor, **kwargs):
        """`.loss`: the loss of the last stage; of another, a scalar whose backward brings a gradient."""
        if self.receives is not None:
            size = (*input_ids.shape, self.hidden_size)
            hidden = torch.empty(size, dtype=self.dtype, device=input_ids.device).normal_()
            kwargs["inputs_embeds"] = hidden.requires_grad_(self.receives)
        if self.head:
            return self.model(input_ids, **kwargs)
        return SimpleNamespace(
            loss=self.model.transformer(
                input_ids, inputs_embeds=kwargs.get("inputs_embeds"), use_cache=False
            ).last_hidden_state
        )


def replace_layers(config: ChatGLMConfig, layers: int) -> ChatGLMConfig:
    """The same model with another number of blocks."""
    return ChatGLMConfig(**{**config.to_dict(), "num_layers": layers})


def device_map_of(config: ChatGLMConfig, case: Case) -> tuple[dict[str, int], tuple[int, ...]]:
    """The full map of the split, and how many blocks each GPU has."""
    cut = case.cut
    if cut is None:
        plan = plan_device_map(config, ["14.75GiB"] * case.gpus if case.gpus > 1 else ["80GiB"], 4, 1024, "memory")
        cut = tuple(len(blocks) for blocks in plan.blocks)
    embedding, *blocks, norm, head = part_names(config.num_layers)
    homes = [gpu for gpu, count in enumerate(cut) for _ in range(count)]
    last = len(cut) - 1
    return {
        embedding: last if case.embedding == "tied" else 0,
        **dict(zip(blocks, homes, strict=True)),
        norm: last,
        head: last,
    }, cut


def planned_cases(config: ChatGLMConfig, gpu: str = "15GiB") -> list[Case]:
    """The planner's fastest plan for two such GPUs at 4 x 1024 with all micro-batches in flight, as they are in a stage
    that is measured alone."""
    base = Case()
    plan = plan_device_map(config, [gpu] * 2, base.batch, base.length, "speed", in_flight=base.batch)
    cut = tuple(len(blocks) for blocks in plan.blocks if blocks)
    return [
        replace(
            base,
            gpus=len(cut),
            stage=stage,
            cut=cut,
            micro_batches=plan.micro_batches,
            checkpointed=tuple(plan.checkpointed_layers),
            embedding=plan.embedding,
            loss_chunk=plan.setting.loss_chunk,
        )
        for stage in range(len(cut))
    ]


def random_ids(config: ChatGLMConfig, case: Case) -> dict[str, Tensor]:
    """Half prompt, half answer; the share of labels is what the case says, wherever they fall."""
    ids = torch.randint(10, min(1000, config.vocab_size), (case.batch, case.length))
    ids[:, case.length // 2 - 2], ids[:, case.length // 2 - 1] = config.gmask_token_id, config.bos_token_id
    labels = ids.clone()
    labels[:, : case.length - round(case.length * case.label_share)] = -100
    return {"input_ids": ids, "labels": labels}


def measure(config: ChatGLMConfig, case: Case, device: str, steps: int, profile: bool = False) -> dict:
    """The figures of one case; whatever it allocated is gone afterwards."""
    kernels = [SDPBackend.EFFICIENT_ATTENTION] if case.attention == "efficient" and device != "cpu" else list(ANY)
    with sdpa_kernel(kernels):
        result = build_and_run(config, case, device, steps, profile)
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return result


def make_step(config: ChatGLMConfig, case: Case, device: str) -> Callable[[dict[str, Tensor]], None]:
    """Build the model of this case, or its stage; returns a function that trains one step on a batch."""
    on_gpu = device != "cpu"
    dtype = torch.float16 if on_gpu else torch.float32
    device_map, cut = device_map_of(config, case)
    stage = 0 if case.stage is None else case.stage
    if case.stage is None and case.gpus > 1:
        raise SystemExit("several GPUs at once are measured by benchmarks/two_gpus.py; give --stage here")
    start = sum(cut[:stage])
    blocks = range(start, start + cut[stage])
    holds_embedding = device_map["transformer.word_embeddings"] == stage and (stage == 0 or case.gpus == 1)
    marks = marked_blocks(config, case)

    torch.manual_seed(0)
    last = stage == len(cut) - 1
    model = StageModel(config, blocks, holds_embedding, last, dtype, device)
    model = prepare(model, [block - start for block in blocks if marks[block]], fused=case.lora == "fused")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=on_gpu)
    scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)

    def one_step(batch: dict[str, Tensor]) -> None:
        run_step(
            model,
            batch,
            case.micro_batches,
            device=device,
            backward=lambda loss: scaler.scale(loss).backward(),
            loss_chunk=case.loss_chunk,
        )
        update(scaler, optimizer)

    return one_step


def update(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """What the Trainer does behind a backward pass: clip, step, forget the gradients."""
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def build_and_run(config: ChatGLMConfig, case: Case, device: str, steps: int, profile: bool) -> dict:
    """Build, warm up, run `steps` steps."""
    on_gpu = device != "cpu"
    one_step, batch = make_step(config, case, device), random_ids(config, case)
    for _ in range(2):
        one_step(batch)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        one_step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    _, cut = device_map_of(config, case)
    blocks = [block for block, marked in enumerate(marked_blocks(config, case)) if marked]
    exact = asdict(case) | {"cut": cut, "checkpointed": blocks}
    predicted, moment = forecast_case(config, exact, "float16" if on_gpu else "float32")
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    result = {
        "bench": "train_step",
        **{key: value for key, value in asdict(case).items() if value is not None},
        "cut": list(cut),
        "ms": round(statistics.median(times), 1),
        "ms_all": [round(value, 1) for value in times],
        "peak_bytes": peak,
        "predicted_peak_bytes": predicted,
        "difference": round(predicted / peak - 1, 4) if peak else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "moment": moment,
    }
    if profile:
        print_profile(lambda: one_step(batch))
    return result


def print_profile(one_step) -> None:
    """The kernels that take the most time, of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        one_step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if str(event.device_type).endswith("CUDA")]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    print(f"kernels {sum(event.self_device_time_total for event in kernels) / 1e3:.1f} ms in all")
    for event in kernels[:32]:
        print(f"{event.self_device_time_total / 1e3:8.2f} ms {event.count:5} x {event.key[:150]}")


def marked_blocks(config: ChatGLMConfig, case: Case) -> list[bool]:
    """For each block of the model, whether this case checkpoints it."""
    return is_checkpointed(config.num_layers, _checkpointed(case.checkpointed, config.num_layers))


def _checkpointed(text: str | tuple[int, ...], layers: int) -> str | int | tuple[int, ...]:
    if text in ("all", "none") or isinstance(text, tuple):
        return text
    return layers // 2 if text == "half" else int(text)


SPLIT = (15, 13)
SUITES = {
    "memory": [
        Case(batch=1, length=512),
        Case(batch=1, length=2048),
        Case(),
        Case(lora="peft"),
        Case(length=2048, loss_chunk=1024),
        Case(batch=16, length=512, micro_batches=4),
        Case(checkpointed="half"),
        Case(checkpointed="none"),
        Case(label_share=0.3),
        *(Case(gpus=2, stage=k, cut=SPLIT, loss_chunk=128, micro_batches=4) for k in (0, 1)),
        *(Case(gpus=2, stage=k, cut=SPLIT) for k in (0, 1)),
        *(Case(gpus=2, stage=k, cut=SPLIT, embedding="first") for k in (0, 1)),
        *(Case(gpus=2, stage=k, cut=SPLIT, batch=60, micro_batches=15) for k in (0, 1)),
    ],
    "speed": [
        Case(),
        Case(lora="peft"),
        Case(attention="any"),
        Case(checkpointed="none"),
        *(Case(gpus=2, stage=k, cut=SPLIT) for k in (0, 1)),
    ],
}


def main() -> None:
    """Read the command line, measure, print a JSON line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, field in Case.__dataclass_fields__.items():
        if name != "cut":
            kind = int if field.default is None else type(field.default)
            parser.add_argument("--" + name.replace("_", "-"), type=kind, default=field.default)
    parser.add_argument("--cut", type=int, nargs="+", help="blocks on each GPU; default: the planner's memory plan")
    parser.add_argument("--suite", choices=[*SUITES, "planned"], help="a list of cases in place of one")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="print the longest kernels")
    parser.add_argument("--tiny", action="store_true", help="the tiny model's shape on the CPU")
    options = vars(parser.parse_args())
    suite, steps, profile, tiny = (options.pop(key) for key in ("suite", "steps", "profile", "tiny"))
    if options["cut"]:
        options["cut"] = tuple(options["cut"])
    config = ChatGLMConfig()
    if tiny:
        config = ChatGLMConfig.from_pretrained(Path(__file__).resolve().parents[1] / "data" / "tiny-chatglm")
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device: use --tiny for a small model on the CPU")
    cases = planned_cases(config) if suite == "planned" else SUITES[suite] if suite else [Case(**options)]
    for case in cases:
        try:
            print(json.dumps(measure(config, case, "cpu" if tiny else "cuda", steps, profile)), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            print(json.dumps({"bench": "train_step", **asdict(case), "error": str(error)[:200]}), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
