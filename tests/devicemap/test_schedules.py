"""Order, seconds and bytes of processes: against PyTorch's schedules, against another simulation, and tensor by tensor."""

import contextlib
import gc
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B, schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.step_memory import TERMS
from glmhelpers.cost_model.step_time import StageTime, step_seconds
from glmhelpers.devicemap.schedules import rank_terms, run_order, work_order
from glmhelpers.distributed import stage as stage_room
from glmhelpers.distributed.plan import ProcessPlan
from glmhelpers.distributed.processes import Processes, make_mesh
from glmhelpers.distributed.roads import contents
from glmhelpers.distributed.stage import make_stage
from glmhelpers.distributed.step import PipelineStep
from glmhelpers.lora.attach import adapter_weights
from tests.helpers.storage_tracker import StorageTracker, as_on_a_gpu
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration


def torchs_order(schedule, ranks, stages_per_rank, parts):
    """For each rank, (is it forward?, stage, micro-batch) as PyTorch's schedule has it."""
    if schedule == "Interleaved1F1B":
        a_round = parts // max(1, parts // ranks)
        known = {"n_local_stages": stages_per_rank, "microbatches_per_round": a_round, "pp_group_size": ranks}
        made = SimpleNamespace(**known, _n_microbatches=parts)
        orders = [ScheduleInterleaved1F1B._calculate_single_rank_operations(made, rank) for rank in range(ranks)]
        kinds = {"FORWARD": True, "FULL_BACKWARD": False}
        return [
            [(kinds[do.computation_type.name], do.stage_index, do.microbatch_index) for do in order if do is not None]
            for order in orders
        ]
    kind = ScheduleGPipe if schedule == "GPipe" else Schedule1F1B
    return [watched_order(kind, rank, ranks, parts) for rank in range(ranks)]


def watched_order(kind, rank, ranks, parts):
    """What the loop of a schedule really asks its stage to do; what 1F1B says of itself is another order."""
    done, stage = [], mock.MagicMock(stage_index=rank)
    stage.forward_one_chunk = lambda number, *_, **__: done.append((True, rank, number))
    stage.backward_one_chunk = lambda number, **_: done.append((False, rank, number))
    for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, name).return_value = []
    made = mock.MagicMock(_stage=stage, _num_stages=ranks, _n_microbatches=parts)
    made._check_inputs.return_value = ([()] * parts, [{}] * parts)
    kind._step_microbatches(made)
    return done


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages_per_rank", "parts"),
    [
        *[("GPipe", ranks, 1, parts) for ranks, parts in ((1, 1), (2, 1), (2, 4), (4, 8))],
        *[("1F1B", ranks, 1, parts) for ranks, parts in ((2, 2), (2, 8), (4, 4), (4, 7))],
        *[("Interleaved1F1B", *sizes) for sizes in ((2, 2, 2), (2, 2, 8), (2, 3, 4), (4, 2, 8), (4, 2, 2), (3, 2, 9))],
    ],
)
def test_order_is_that_of_pytorch(schedule, ranks, stages_per_rank, parts):
    orders = work_order(schedule, ranks, stages_per_rank, parts)
    ours = [[(work.kind == "forward", work.stage, work.micro_batch) for work in order] for order in orders]
    assert ours == torchs_order(schedule, ranks, stages_per_rank, parts)


def latest_constraint(orders, times, transfer):
    """Start and end of every piece of work by raising them until no constraint is broken: no order of events at all."""
    works = [(rank, place, work) for rank, order in enumerate(orders) for place, work in enumerate(order)]
    ends, hosts = dict.fromkeys((work for _, _, work in works), 0.0), {}
    for order in orders:
        for place, work in enumerate(order):
            time = times[work.stage]
            before = hosts[order[place - 1]] if place else 0.0
            hosts[work] = before + (time.launch_forward if work.kind == "forward" else time.launch_backward)
    changed = True
    while changed:
        changed = False
        for rank, place, work in works:
            behind, time, least = orders[rank][place - 1] if place else None, times[work.stage], 0.0
            neighbours = [
                other
                for other in ends
                if other.kind == work.kind
                and other.micro_batch == work.micro_batch
                and other.stage == work.stage + (-1 if work.kind == "forward" else 1)
            ]
            mine = [ends[behind]] if behind else [0.0]
            arrived = max(mine + [ends[other] for other in neighbours])
            least = arrived + (transfer if neighbours and len(orders) > 1 else 0.0)
            least = max(least, hosts[behind] if behind else 0.0)
            end = max(least + (time.forward if work.kind == "forward" else time.backward), hosts[work])
            if end > ends[work] + 1e-12:
                ends[work], changed = end, True
    return max(ends.values())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_seconds_equal_those_of_another_simulation(data):
    schedule = data.draw(st.sampled_from(["GPipe", "1F1B", "Interleaved1F1B"]))
    ranks = data.draw(st.integers(1, 4))
    stages_per_rank = data.draw(st.integers(2, 3)) if schedule == "Interleaved1F1B" else 1
    parts = ranks * data.draw(st.integers(1, 3))
    number = st.floats(0, 5, allow_subnormal=False)
    times = [StageTime(*(data.draw(number) for _ in range(4))) for _ in range(ranks * stages_per_rank)]
    transfer = data.draw(number)
    orders = work_order(schedule, ranks, stages_per_rank, parts)
    tasks = run_order(orders, times, transfer)
    assert max(task.end for task in tasks) == pytest.approx(latest_constraint(orders, times, transfer))
    for rank in range(ranks):
        mine = [task for task in tasks if task.gpu == rank]
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(mine))


def test_bubbles_are_those_of_the_textbooks():
    times = [StageTime(1.0, 2.0)] * 4
    for schedule in ("GPipe", "1F1B"):  # (stages - 1) / parts of the work is bubble, for both
        assert run_order(work_order(schedule, 4, 1, 8), times)[-1].end == pytest.approx(3 * 8 + 3 * 3)
    assert step_seconds(times, 8) == pytest.approx(33)
    halves = [StageTime(0.5, 1.0)] * 8  # two stages a rank: half of that
    assert max(task.end for task in run_order(work_order("Interleaved1F1B", 4, 2, 8), halves)) == pytest.approx(
        24 + 4.5
    )


def test_each_rank_starts_its_own_kernels():
    host = StageTime(0.0, 0.0, 1.0, 2.0)
    assert step_seconds([host] * 2, 4) == 24
    assert max(task.end for task in run_order(work_order("GPipe", 2, 1, 4), [host] * 2)) == 12


CASES = [
    ((4, 4), "GPipe", 1, 4, 0),
    ((4, 4), "1F1B", 1, 4, 0),
    ((5, 3), "1F1B", 1, 4, 3),
    ((4, 4), "Interleaved1F1B", 2, 4, 0),
    ((4, 4), "GPipe", 1, 2, 8),
    ((2, 2, 2, 2), "1F1B", 1, 8, 0),
    ((2, 2, 2, 2), "Interleaved1F1B", 2, 8, 8),
]


@contextlib.contextmanager
def one_rank(rank, world):
    """This process as one rank of a pipeline whose others do not exist; nothing is sent."""

    def all_static(self, stages, *_):
        from torch.distributed.pipelining._utils import InferenceMode

        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    def nothing_sent(*_, **__):  # a Mock would remember the tensors, which then live for ever
        return []

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with (
            mock.patch.object(schedules, "_batch_p2p", nothing_sent),
            mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", all_static, create=True),
            mock.patch.object(stage_room, "check_filled"),
        ):
            yield Processes(make_mesh(world, "cpu", timedelta(seconds=5)), torch.device("meta"))
    finally:
        dist.destroy_process_group()


def peak_of(config, plan, rank, rows, length, answers):
    """(bytes of tensors at the worst moment of a step, those of weights and adapter), at full width without data."""
    with one_rank(rank, plan.ranks) as processes:
        stages = []
        for cut in plan.stages:
            if cut.rank == rank:
                with torch.device("meta"):
                    net = ChatGLMForConditionalGeneration(config).half()
                net.to("meta").config.dtype = torch.float16
                net.lm_head.weight = net.transformer.word_embeddings.weight
                stages.append(make_stage(net, plan, cut))
        ids = torch.zeros(rows, length, dtype=torch.long)
        labels = torch.zeros_like(ids)
        labels[:, : length - answers] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        weights = [weight for stage in stages for weight in adapter_weights(stage.model).values()]
        parameters = {parameter for stage in stages for parameter in stage.parameters()}
        engine, tracker = PipelineStep(stages, plan, processes, loss_chunk=512), StorageTracker()
        tracker.ignore(*parameters, ids, labels)
        with as_on_a_gpu(), tracker:
            engine(batch)
            for weight in weights:
                weight.grad = None
            gc.collect()  # or what Python has not thrown away of the first step would count
            tracker.peak = 0
            engine(batch)
        return tracker.peak, sum(one.numel() * one.element_size() for one in parameters)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_of_each_rank_are_those_of_the_real_engine(case):
    counts, schedule, stages_per_rank, parts, kept = case
    config, rows, length, answers = ChatGLMConfig(num_layers=8), 8, 256, 120
    plan = ProcessPlan(counts, schedule, parts, stages_per_rank, tuple(range(8 - kept)))
    setting = Setting(rows, length, parts, label_share=answers / (length - 1))
    for rank in {0, plan.ranks - 1}:
        peak, weights = peak_of(config, plan, rank, rows, length, answers)
        order = work_order(schedule, plan.ranks, stages_per_rank, parts)[rank]
        terms = rank_terms(Shape.of(config), setting, contents(plan)[rank], order)
        assert set(terms) == set(TERMS)
        assert terms["weights"] + terms["embedding"] + terms["lora"] == weights
        # The real one has no optimizer here.
        assert sum(terms.values()) - terms["adam"] == pytest.approx(peak + weights, rel=0.01), (rank, terms)
