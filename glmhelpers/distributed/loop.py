"""The training loop of many processes: the same rows, losses and checkpoints as the Trainer's in one process.

    agree (versions, job) ─► stages ─► agree (rows, base) ─► newest checkpoint ─► steps ─► adapter

    step n    rows n * B ... of the epoch's order, which depends on seed and epoch alone     (SameOrderSampler)
              random numbers from seed, n and rank                   -> a run that is taken up draws the same dropout
              loss, norm and overflow of all ranks together          -> all take the step, or none

Every rank runs this loop and comes to the same decisions from the same numbers, so nobody has to be told what to do.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, get_scheduler

from glmhelpers.devicemap.captured import Captured
from glmhelpers.distributed.checkpoint import Store, base_of, settings_of, start_from
from glmhelpers.distributed.job import OWN_TO_A_NODE, Job
from glmhelpers.distributed.processes import Processes, StartError, agree, facts_here
from glmhelpers.distributed.stage import build_stage
from glmhelpers.distributed.step import PipelineStep, make_scaler, update
from glmhelpers.lora.adapter import write_adapter
from glmhelpers.lora.adapter_files import read_adapter
from glmhelpers.lora.attach import adapter_weights
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_file
from glmhelpers.training.checkpoint_manager import last_complete, rows_digest, run_folder, run_settings, write_settings
from glmhelpers.training.guards import Guard, refuse_rows
from glmhelpers.training.trainer import SameOrderSampler
from glmhelpers.utils.files import whole_file
from thuglm import ChatGLMConfig, ChatGLMTokenizer


class Batches:
    """Batch of each step, collated from the whole step's rows: the Trainer's order, on every rank.

    Args:
        dataset: encoded rows.
        collator: makes a batch of some rows.
        size: rows of a step; the last step of an epoch may have fewer.
        seed: of the order.
    """

    def __init__(self, dataset: Any, collator: Any, size: int, seed: int):
        self.dataset, self.collator, self.size = dataset, collator, size
        self.sampler = SameOrderSampler(size, list(dataset["length"]), seed)
        self.order: list[int] = []
        self.epoch = -1

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.dataset) // self.size)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels`, [B, L]; steps are counted from 0."""
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.sampler.set_epoch(epoch)
            self.order, self.epoch = list(self.sampler), epoch
        rows = self.order[number * self.size : (number + 1) * self.size]
        return self.collator([self.dataset[row] for row in rows])


def in_order(dataset: Any, collator: Any, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows, as they stand in the file."""
    for start in range(0, len(dataset), size):
        yield collator([dataset[row] for row in range(start, min(start + size, len(dataset)))])


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank, the same in every attempt."""
    return (seed * 1_000_003 + step) * 65_536 + rank


def train(job: Job, processes: Processes) -> list[dict[str, Any]]:
    """Train, or go on with a run that was stopped; return its log: dicts with `step` and `loss`.

    Args:
        job: what and how.
        processes: all ranks, see `joined`.

    Raises:
        StartError: ranks that do not agree, or a plan that does not fit the model or the number of processes.
        TrainingStoppedError: the loss is no number or 0, or every step is skipped.
    """
    world = processes.pipelines * processes.mesh["pp"].size()
    agree(facts_here() | {name: value for name, value in vars(job).items() if name not in OWN_TO_A_NODE})
    config, tokenizer = ChatGLMConfig.from_pretrained(job.folder), ChatGLMTokenizer.from_pretrained(job.folder)
    try:
        plan = job.plan(config.num_layers, world)
    except ValueError as error:
        raise StartError(str(error)) from None
    dataset = encode_file(job.rows, tokenizer, template=job.template, max_length=job.max_length or None)
    refuse_rows(dataset, "to train on")
    held_out = encode_file(job.eval_rows, tokenizer, template=job.template) if job.eval_rows else None
    if held_out is not None:
        refuse_rows(held_out, "for evaluation")
    targets = tuple(job.targets.split(","))
    lora: dict[str, Any] = {"r": job.lora_rank, "alpha": job.alpha, "dropout": job.dropout, "targets": targets}
    adapter = read_adapter(job.start_from) if job.start_from else None
    if adapter is not None:
        lora = settings_of(adapter)
    stages = [
        build_stage(job.folder, plan, cut, processes.device, job.dtype, seed=job.adapter_seed, **lora)
        for cut in plan.stages
        if cut.rank == processes.stage_rank
    ]
    args, base = job.training_arguments(), base_of(stages, processes)
    if adapter is not None:
        start_from(adapter, stages, base)
    settings = run_settings(stages[0].model, dataset, args, base["fingerprint"])
    kept = rows_digest(held_out)[1] if held_out is not None else "none"
    same = {"base": base["fingerprint"], "adapter": settings["starts_from"], "rows": settings["rows_digest"]}
    agree(same | {"rows for evaluation": kept})

    parameters = [weight for stage in stages for weight in adapter_weights(stage.model).values()]
    # As the Trainer has it: two groups, of which the second is for biases, and LoRA has none.
    groups: list[dict[str, Any]] = [{"params": parameters}, {"params": [], "weight_decay": 0.0}]
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(
        groups, job.learning_rate, betas, args.adam_epsilon, weight_decay=job.weight_decay, fused=True
    )
    scheduler = get_scheduler(job.lr_scheduler_type, optimizer, job.warmup_steps, job.max_steps)
    scaler = make_scaler(processes.device) if job.on_gpu else None
    captured = Captured(stages[0].model) if job.cuda_graphs and job.on_gpu else None
    engine = PipelineStep(stages, plan, processes, job.loss_chunk, scaler, captured)
    folder = run_folder(job.output, settings)
    store = Store(folder, stages, optimizer, scheduler, scaler, processes, job.save_total_limit)
    guard = Guard(lambda: last_complete(folder, say=lambda _: None))
    batches = Batches(dataset, RightPadCollator(tokenizer), job.rows_per_step, job.seed)
    say = print if processes.rank == 0 else (lambda *texts, **how: None)

    if processes.rank in store.writers:
        write_settings(folder, settings)
    state, window = store.resume()
    if state is None:
        # With the control that the Trainer wants to find, should it go on from a checkpoint of ours.
        control: Any = TrainerControl()
        state = TrainerState(max_steps=job.max_steps, stateful_callbacks=[control])
        window = {"sum": 0.0, "logged": 0}
        pipelines = "1 pipeline" if processes.pipelines == 1 else f"{processes.pipelines} pipelines"
        say(f"{folder.name} begins: {world} processes, {pipelines} of {plan}", flush=True)
    else:
        say(f"{folder.name} goes on from step {state.global_step} of {state.max_steps}", flush=True)
    state.logging_steps, state.save_steps, state.train_batch_size = job.logging_steps, job.save_steps, job.rows_per_step
    saved = time.monotonic()
    while state.global_step < job.max_steps:
        torch.manual_seed(seed_of(job.seed, state.global_step, processes.rank))
        rate = scheduler.get_last_lr()[0]
        processes.at(state.global_step + 1, 0)
        batch = batches[state.global_step]
        processes.at(state.global_step + 1, 1)
        share = engine(batch)
        processes.at(state.global_step + 1, 2)
        loss, norm, taken = update(optimizer, share, processes, scaler, job.max_grad_norm)
        state.global_step += 1
        guard.judge(loss, taken or scaler is not None, state.global_step, args)
        guard.count_skip(not taken, state.global_step, args)
        if taken:
            scheduler.step()
        state.epoch = state.global_step / batches.per_epoch
        window = {**window, "sum": window["sum"] + loss}
        if state.global_step % job.logging_steps == 0 or state.global_step == job.max_steps:
            mean = window["sum"] / (state.global_step - window["logged"])
            entry = {"loss": mean, "grad_norm": norm, "learning_rate": rate, "epoch": state.epoch}
            state.log_history.append({**entry, "step": state.global_step})
            window = {"sum": 0.0, "logged": state.global_step}
            say(f"step {state.global_step} of {job.max_steps}: loss {mean:.6f}, gradient norm {norm:.4f}", flush=True)
        last = state.global_step == job.max_steps
        if held_out is not None and (last or (job.eval_steps and state.global_step % job.eval_steps == 0)):
            processes.at(state.global_step, 3)
            mean = engine.evaluate(in_order(held_out, batches.collator, job.rows_per_step))
            state.log_history.append({"eval_loss": mean, "epoch": state.epoch, "step": state.global_step})
            say(f"step {state.global_step} of {job.max_steps}: evaluation loss {mean:.6f}", flush=True)
        if _due(job, state.global_step, saved, processes):
            processes.at(state.global_step, 4)
            store.save(state, window)
            saved = time.monotonic()
    _write(job, store, base, settings)
    if processes.rank == 0:
        with whole_file(job.log_file) as draft:
            draft.write_text(json.dumps(state.log_history), encoding="utf-8")
    say(f"adapter saved in {job.adapter_folder}", flush=True)
    return state.log_history


def _due(job: Job, step: int, saved: float, processes: Processes) -> bool:
    """Is it time for a checkpoint? Clocks differ, so rank 0's counts."""
    if step % job.save_steps == 0 or step == job.max_steps:
        return True
    late = torch.tensor([float(time.monotonic() - saved > 60 * job.minutes)])
    torch.distributed.broadcast(late, 0)
    return bool(late.item())


def _write(job: Job, store: Store, base: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """The adapter, on every machine that keeps files of its own."""
    found = store.gathered()
    if found is not None:
        config: Any = store.stages[0].model.peft_config["default"]
        weights = {name: entry["weight"] for name, entry in found.items()}
        write_adapter(job.adapter_folder, config, weights, base, job.template, settings)
    torch.distributed.barrier()
