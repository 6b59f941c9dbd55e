"""Groups of processes on this machine: one Python that has imported everything forks each group, and ranks run cases.

`python -m tests.helpers.process_cases TINY GROWN RESULTS` runs all cases of 4 and of 2 processes and writes what rank 0
of each group gathered: case -> loss and gradient of every LoRA matrix. The test compares them with one process.
"""

import contextlib
import json
import os
import socket
import sys
import zlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from glmhelpers.cost_model.placement import Placement, part_names
from glmhelpers.devicemap.captured import Captured
from glmhelpers.distributed import loop
from glmhelpers.distributed.job import Job
from glmhelpers.distributed.plan import ProcessPlan
from glmhelpers.distributed.processes import StartError, joined
from glmhelpers.distributed.stage import build_stage
from glmhelpers.distributed.step import PipelineStep, make_scaler, update
from glmhelpers.lora.attach import adapter_weights
from tests.helpers.graph_home import Home
from thuglm import ChatGLMConfig

PROJECT = Path(__file__).resolve().parents[2]
TINY = PROJECT / "data" / "tiny-chatglm"

ROWS = ((5, 9), (12, 3), (7, 7), (3, 14), (9, 4), (2, 2))
"""(tokens of the prompt, of the answer): six rows, which neither 4 parts nor 2 x 4 parts share out evenly."""


def a_batch(config):
    """A batch of ROWS with drawn ids, padded on the right."""
    length = max(map(sum, ROWS)) + 3
    ids = torch.full((len(ROWS), length), 3)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    generator = torch.Generator().manual_seed(5)
    for row, (prompt, answer) in enumerate(ROWS):
        drawn = torch.randint(100, 1000, (prompt + answer,), generator=generator).tolist()
        line = [*drawn[:prompt], config.gmask_token_id, config.bos_token_id, *drawn[prompt:], config.eos_token_id]
        ids[row, : len(line)] = torch.tensor(line)
        mask[row, : len(line)] = 1
        labels[row, prompt + 2 : len(line)] = ids[row, prompt + 2 : len(line)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def draw_adapter(model):
    """Numbers that depend on a matrix's name alone; lora_B too, or the gradients of lora_A would be 0."""
    for name, weight in adapter_weights(model).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)


def placed(*counts):
    """A placement with so many blocks on GPU 0, 1, ..."""
    names = part_names(sum(counts))
    gpus = [gpu for gpu, count in enumerate(counts) for _ in range(count)]
    return Placement(dict(zip(names, [0, *gpus, gpus[-1], gpus[-1]], strict=True)))


CASES = {
    4: {
        **{
            f"pp=4 {schedule} {checkpointed}": ("tiny", (1, 3, 2, 2), schedule, checkpointed, 1)
            for schedule in ("GPipe", "1F1B")
            for checkpointed in ("all", "none")
        },
        "pp=4 Interleaved1F1B all": ("tiny", (2, 2, 2, 2), "Interleaved1F1B", "all", 2),
        "pp=4 Interleaved1F1B none": ("tiny", (2, 2, 2, 2), "Interleaved1F1B", "none", 2),
        **{
            f"dp=2 pp=2 {schedule} {checkpointed}": ("tiny", (5, 3), schedule, checkpointed, 1)
            for schedule in ("GPipe", "1F1B")
            for checkpointed in ("all", "none")
        },
        "dp=2 pp=2 Interleaved1F1B all": ("tiny", (5, 3), "Interleaved1F1B", "all", 2),
        "dp=2 pp=2 Interleaved1F1B none": ("tiny", (5, 3), "Interleaved1F1B", "none", 3),
        "grown pp=4": ("grown", (4, 3, 3, 2), "1F1B", 5, 1),
        "grown dp=2 pp=2": ("grown", (7, 5), "GPipe", "none", 1),
    },
    2: {
        **{
            f"pp=2 {schedule} {checkpointed}": ("tiny", (5, 3), schedule, checkpointed, 1)
            for schedule in ("GPipe", "1F1B")
            for checkpointed in ("all", "none")
        },
        "pp=2 Interleaved1F1B all": ("tiny", (5, 3), "Interleaved1F1B", "all", 2),
        "pp=2 Interleaved1F1B none": ("tiny", (4, 4), "Interleaved1F1B", "none", 4),
        "dp=2 all": ("tiny", (8,), "1F1B", "all", 1),
        "dp=2 none": ("tiny", (8,), "GPipe", "none", 1),
        "dp=2 recorded, all": ("tiny", (8,), "GPipe", "all", 1, True),
        "dp=2 recorded, some": ("tiny", (8,), "1F1B", 3, 1, True),
    },
}
"""Processes -> name -> (checkpoint, blocks of each rank, schedule, checkpointed blocks, stages of each rank, and
whether its blocks are recorded, by a stand-in for CUDA graphs)."""


def one_step(folders, checkpoint, counts, schedule, checkpointed, stages_per_rank, recorded=False):
    """(loss, LoRA gradients) of one batch, gathered from all ranks; also that replicas agree to the bit."""
    settings = {"micro_batches": 1 if recorded else 4, "stages_per_rank": stages_per_rank, "checkpointed": checkpointed}
    plan = ProcessPlan.of(placed(*counts), sum(counts), schedule, **settings)
    with joined_again(plan.ranks) as processes:
        stages = [
            build_stage(folders[checkpoint], plan, cut, processes.device, torch.float32, dropout=0.0)
            for cut in plan.stages
            if cut.rank == processes.stage_rank
        ]
        for stage in stages:
            draw_adapter(stage.model)
        captured = Captured(stages[0].model, Home) if recorded else None
        loss = PipelineStep(stages, plan, processes, captured=captured)(
            a_batch(ChatGLMConfig.from_pretrained(folders[checkpoint]))
        )
        assert captured is None or (all(captured.known.values()) and captured.known)
        dist.all_reduce(loss)
        mine = {n: w.grad for stage in stages for n, w in adapter_weights(stage.model).items()}
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
    gradients = {}
    for found in everybody:
        for name, gradient in found.items():
            assert torch.equal(gradient, gradients.setdefault(name, gradient)), name
    return loss.item(), gradients


SCHEDULE = {"max_steps": 12, "rows_per_step": 4, "logging_steps": 3, "save_steps": 4, "warmup_steps": 2}
JOB = {**SCHEDULE, "micro_batches": 2, "learning_rate": 5e-3, "dropout": 0.0, "max_length": 40}
"""A run of several epochs of 18 rows, whose last step in each has two rows only."""

INTERLEAVED = {"schedule": "Interleaved1F1B", "stages_per_rank": 2}
EVALUATED = {"eval_rows": "rows.jsonl", "eval_steps": 2, "max_steps": 3, "lora_rank": 2}
PATHS = ("start_from", "eval_rows")

RUNS = {
    4: {
        # Begun by one process with the Trainer, stopped behind checkpoint-4.
        "begun_by_one": ({"blocks": "5,3", "eval_rows": "rows.jsonl"}, None),
    },
    2: {
        "two": (INTERLEAVED, None),
        # Goes on from the adapter of the first.
        "started": ({"blocks": "5,3", **INTERLEAVED, "start_from": "two/adapter", **EVALUATED}, None),
        # Stopped in step 7, after checkpoint-4: goes on with one pipeline less, and then in one process.
        "handed_over": ({"blocks": "8"}, 7),
        # What a run with faults is compared with.
        "unbroken": ({"blocks": "5,3", "dropout": 0.2}, None),
    },
}
"""Processes -> folder of the output -> (how the job is cut, the step in which it is stopped)."""


def write_rows(folder):
    """18 rows of several lengths, as `convert_alpaca` writes them."""
    rows = [{"instruction": f"数字{i}", "output": f"答案是{i}。" * (1 + i % 4)} for i in range(18)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def a_job(tiny, folder, name, **changes):
    """The job of `JOB` whose output goes to `folder`/`name`."""
    places = {"folder": str(tiny), "rows": str(folder / "rows.jsonl"), "output": str(folder / name)}
    return Job(**places, device="cpu", **{**JOB, **changes})


def refusals(tiny, folder, rank):
    """What both ranks say if the second has another torch, another plan, other rows."""
    other = folder / "other"
    other.mkdir(exist_ok=True)
    (other / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    said = []
    for name in ("torch", "plan", "rows"):
        job = a_job(tiny, other if rank and name == "rows" else folder, "refused")
        if rank and name == "plan":
            job = replace(job, blocks="3,5")
        real = loop.facts_here
        if rank and name == "torch":
            loop.facts_here = lambda real=real: {**real(), "torch": "1.0"}
        with joined_again(0) as processes:
            try:
                loop.train(job, processes)
            except StartError as error:
                said.append(str(error))
            loop.facts_here = real
            everybody = [None, None]
            dist.all_gather_object(everybody, said)
    return everybody


def a_run(tiny, folder, name, cut, stop):
    """Run this rank's part of a job, perhaps to the step in which it is stopped."""
    job = a_job(tiny, folder, name, **{key: str(folder / x) if key in PATHS else x for key, x in cut.items()})
    real, steps = loop.update, []

    def stopping(*args):
        steps.append(1)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return real(*args)

    loop.update = stopping
    try:
        with joined_again(job.ranks) as processes, contextlib.suppress(KeyboardInterrupt):
            loop.train(job, processes)
    finally:
        loop.update = real


def overflow(tiny):
    """Two steps with a GradScaler and each optimizer, an infinite gradient on the last rank in the first of them: what
    each rank did. A fused optimizer, as on a GPU, takes the scaler's verdict into its kernel."""
    plan = ProcessPlan.of(placed(5, 3), 8, "1F1B", micro_batches=4)
    with joined_again(plan.ranks) as processes:
        cut, scaler = plan.stages[processes.stage_rank], make_scaler(processes.device, init_scale=1024.0)
        stage = build_stage(tiny, plan, cut, processes.device, torch.float32, dropout=0.0)
        draw_adapter(stage.model)
        step = PipelineStep([stage], plan, processes, scaler=scaler)
        weights, batch = adapter_weights(stage.model), a_batch(ChatGLMConfig.from_pretrained(tiny))
        fused, found = torch.optim.AdamW(weights.values(), 0.1, fused=True), []
        for optimizer, poisoned in product((torch.optim.SGD(weights.values(), 0.1), fused), (True, False)):
            before, loss = {name: weight.detach().clone() for name, weight in weights.items()}, step(batch)
            if poisoned and processes.rank == 3:
                next(iter(weights.values())).grad[0, 0] = float("inf")
            _, norm, taken = update(optimizer, loss, processes, scaler, 0.5)
            moved = sum((weight - before[name]).norm() ** 2 for name, weight in weights.items()).sqrt()
            found.append((taken, scaler.get_scale(), norm, moved.item()))
        everybody = [None] * 4
        dist.all_gather_object(everybody, found)
    return everybody


def joined_again(ranks, timeout=60):
    """As `joined`, at a new port for each case."""
    os.environ["MASTER_PORT"] = PORTS.pop(0)
    return joined(ranks, False, timeout)


PORTS: list[str] = []


def free_ports(count):
    """Ports that nobody uses now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def fork_group(world, work):
    """Fork `world` processes that each run `work(rank)`; fails if one of them does."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * world, f"exit codes of {world} ranks: {codes}"


def main(tiny, grown, results):
    torch.set_num_threads(1)
    folders = {"tiny": tiny, "grown": grown}
    for world, cases in CASES.items():
        PORTS[:] = free_ports(len(cases) + len(RUNS[world]) + 3)

        def work(rank, world=world, cases=cases):
            found = {name: one_step(folders, *case) for name, case in cases.items()}
            for name, (cut, stop) in RUNS[world].items():
                a_run(tiny, Path(results), name, cut, stop)
            if world == 4:
                found["overflow"] = overflow(tiny)
            else:
                found["refusals"] = refusals(tiny, Path(results), rank)
            if rank == 0:
                torch.save(found, Path(results) / f"{world}.pt")

        fork_group(world, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
