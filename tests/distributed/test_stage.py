"""Plans for processes, and stages that read and hold their own part and nothing else; no process is started."""

from dataclasses import fields, replace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from glmhelpers.cost_model.placement import Placement
from glmhelpers.devicemap.plan import plan_device_map
from glmhelpers.distributed import Job, ProcessPlan
from glmhelpers.distributed.hang import hanging
from glmhelpers.distributed.processes import NEEDED, OWN_STORE, StartError, check_start
from glmhelpers.distributed.stage import build_stage
from glmhelpers.distributed.step import my_rows
from glmhelpers.weights.reading import BlockReader
from tests.helpers.process_cases import TINY, a_batch, placed
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
def test_stages_read_and_hold_each_tensor_once(schedule, monkeypatch):
    read, real = [], BlockReader.fill

    def fill(self, path, targets):
        read.extend(entry.nbytes for entry, _ in targets)
        return real(self, path, targets)

    monkeypatch.setattr(BlockReader, "fill", fill)
    whole = ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    wanted = dict(whole.named_parameters(remove_duplicate=False))
    plan = ProcessPlan.of(placed(5, 3), 8, schedule, stages_per_rank=1 + (schedule != "1F1B"), micro_batches=2)
    found = {}
    for cut in plan.stages:
        model = build_stage(TINY, plan, cut, torch.device("cpu"), torch.float32).model
        for name, weight in model.named_parameters():
            if "lora_" not in name:
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                assert name not in found, f"{name} is on two stages"
                found[name] = weight
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # Stored in float16; the head's stage reads the embedding, whose tensor it is.
    assert sum(read) == sum(weight.nbytes // 2 for weight in wanted.values())


def test_plan_of_one_process_becomes_a_plan_of_many():
    config = ChatGLMConfig(num_layers=28)
    one = plan_device_map(config, ["T4", "T4"], batch_size=8, seq_length=256)
    many = ProcessPlan.of(one, 28)
    assert many.blocks == tuple(len(blocks) for blocks in one.blocks)
    assert many.micro_batches == one.micro_batches
    assert list(many.checkpointed) == one.checkpointed_layers
    assert [list(cut.blocks) for cut in many.stages] == list(Placement.of(one, 28).blocks.values())


def test_only_1f1b_takes_the_marks_of_a_plan_that_keeps_two_in_flight():
    one = plan_device_map(ChatGLMConfig(num_layers=28), ["T4", "T4"], batch_size=24, seq_length=1024)
    assert (one.setting.flying, one.checkpointed_layers) == (2, [])
    assert ProcessPlan.of(one, 28).checkpointed == ()
    for schedule, stages in (("GPipe", 1), ("Interleaved1F1B", 2)):
        assert ProcessPlan.of(one, 28, schedule, stages_per_rank=stages).checkpointed == tuple(range(28))


def test_interleaved_ranks_hold_what_the_placement_gives_them():
    plan = ProcessPlan((5, 3), "Interleaved1F1B", micro_batches=4, stages_per_rank=2)
    assert [list(cut.blocks) for cut in plan.stages] == [[0, 1, 2], [3, 4], [5, 6], [7]]
    assert [cut.rank for cut in plan.stages] == [0, 1, 0, 1]
    assert [(cut.first, cut.last) for cut in plan.stages] == [(True, False), (False,) * 2, (False,) * 2, (False, True)]


@pytest.mark.parametrize(("pipelines", "parts"), [(1, 4), (2, 4), (4, 1), (3, 2), (8, 1)])
def test_rows_of_all_pipelines_are_the_batch_without_overlap(pipelines, parts):
    batch = a_batch(ChatGLMConfig.from_pretrained(TINY))
    shares = [my_rows(batch, pipelines, number, parts) for number in range(pipelines)]
    assert len({tuple(share["labels"].shape) for share in shares}) == 1
    assert len(shares[0]["labels"]) % parts == 0
    labels = torch.cat([share["labels"] for share in shares])
    ids = torch.cat([share["input_ids"] for share in shares])
    real = (labels != -100).any(dim=1)
    assert torch.equal(ids[real], batch["input_ids"])
    assert torch.equal(labels[real], batch["labels"])


def test_job_survives_its_command_line():
    job = Job("base", "rows.jsonl", "out", blocks="15,13", learning_rate=3e-5, dropout=0.0, max_length=512)
    assert Job.parse(job.arguments()) == job


def test_graphs_are_for_processes_with_the_whole_model_and_one_part():
    job = Job("base", "rows.jsonl", "out", blocks="8", micro_batches=1, cuda_graphs=1)
    assert Job.parse(job.arguments()) == job
    assert job.plan(8, 2).whole
    for changes in ({"blocks": "", "schedule": "GPipe"}, {"blocks": "5,3", "schedule": "GPipe"}, {"micro_batches": 2}):
        with pytest.raises(ValueError, match='use blocks="8", micro_batches=1, or leave cuda_graphs out'):
            replace(job, **changes).plan(8, 2)


def test_options_are_no_short_forms_of_what_starts_the_program():
    """torchrun and accelerate read the whole command line, and take `--r` for the beginning of one of their options."""
    for parser in (get_args_parser(), launch_command_parser()):
        for field in fields(Job):
            option = f"--{field.name.replace('_', '-')}"
            assert not [known for known in parser._option_string_actions if known.startswith(option)], option


def test_the_line_about_a_hang_names_the_rank_that_is_the_least_far():
    places = [["7", "1", "a"], ["7", "0", "b"], ["7", "1", "b"]]
    assert hanging(places, 0).startswith(
        "rank 1 on b hangs: it has not come further than step 7, where it reads its ro"
    )
    assert [hanging(places, rank) for rank in (1, 2)] == ["", ""]
    assert hanging([["7", "1", "a"]] * 2, 0) == ""
    assert hanging([["6", "2", "a"], ["10", "0", "b"]], 1).startswith("rank 0 on a hangs")


def test_wrong_environments_are_refused():
    right = dict(zip(NEEDED, ("0", "4", "0", "localhost", "29500"), strict=True))
    check_start(2, False, right)
    for changes, sentence in (
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set.*torchrun --nproc-per-node 2"),
        ({"WORLD_SIZE": "3"}, "3 processes cannot be pipelines of 2 ranks"),
        (
            {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            f"{OWN_STORE}=1",
        ),
    ):
        with pytest.raises(StartError, match=sentence):
            check_start(2, False, {**right, **changes})
