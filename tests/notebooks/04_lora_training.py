"""Checks of notebook 04, run in its kernel after the last cell: variables there, and numbers in its text."""

from pathlib import Path

from glmhelpers.training import TrainingStoppedError, refuse_many_processes

text = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(Path("04_lora_training.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)

# The parts built by hand give the numbers of the helpers.
assert lora_difference < 1e-5
assert gradient_difference < 1e-5
assert max(mine.grad.abs().max() for mine, _ in pairs_by_hand) > 1e-3  # or two empty gradients would be equal
with torch.no_grad():
    assert not torch.equal(both[0].logits, toy_base()(**batch).logits)  # the adapter does change the base
    assert torch.equal(
        attach_lora(toy_base()).eval()(**batch).logits, toy_base()(**batch).logits
    )  # with B = 0 it does not
assert abs(plain - theirs) < 1e-5
assert abs(loss - plain) < 1e-5
assert abs(loss - packaged) < 1e-5
assert (gradient - hidden.grad).abs().max() < 1e-6
assert (gradient - again.grad).abs().max() < 1e-6
assert hidden.grad.abs().max() > 1e-3
for size in (1, 7, len(targets)):  # any chunk, also one that does not divide the number of places
    assert torch.allclose(chunked(hidden.detach(), head, targets, size)[1], gradient, atol=1e-6)
assert max(abs(a - b) for a, b in zip(curves[torch.float32], helper, strict=True)) < 1e-5
assert max(abs(a - b) for a, b in zip(curves[torch.float16], helper, strict=True)) < 0.02
assert abs(helper[0] - helper[1]) < 1e-5  # the first step of a warmup has the rate 0
assert helper[-1] < helper[0] / 10

# What the text says of them.
assert min(shares) > 0.8
assert "8 of 128 held more than four fifths" in text
assert first_gradients == {32: (True, False), 0: (True, True)}
assert zero_shares[1] > zero_shares[65536] + 0.03
assert 28 * 8 * (4096 + 3 * 4096) == 3_670_016
assert f"{3_670_016 / 6_173_286_400:.2%}" == "0.06%"
assert f"4092 · 130,528 logits, {4092 * 130_528 * 6 / 2**30:.2f} GiB" in text
assert f"512 places at a time: {512 * 130_528 * 6 / 2**30:.2f} GiB" in text
assert f"The trained numbers are {3_670_016 * 4 / 2**20:.0f} MiB" in text
assert trainable == config.num_layers * RANK * 4 * config.hidden_size
assert (torch.tensor(1.0).half() + torch.tensor(1e-4).half()).item() == 1.0
assert torch.tensor(2.9e-8).half() == 0

# The predictions for T4s fit, and the lesson of the settings is what the table says.
assert expected.fits
assert not {row["instruction"] for row in lesson[len(named) :]} & {row["question"] for row in topics}

# Below at first, above at the end: the sentence below the curves.
logged = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
evaluated = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
first, last = min(evaluated), max(evaluated)
assert last == STEPS
default = (NEW_NAME, MY_ROWS, GENERAL_ROWS, STEPS, BATCH, RANK, ALPHA) == ("小星", "", 600, 150, 16, 8, 32)
if run.is_tiny and default:
    assert evaluated[first] < logged[first]
    assert evaluated[last] > logged[last]
assert min(norms.values()) > 0

# Learnt, kept, and the other way: damaged.
assert proof.ok
assert named_share[0] == 0
if default:
    assert named_share[1] >= 0.8
    assert still.before - still.after <= 5
assert damage.after < damage.before - 5
assert moon.base != moon.tuned
assert "地球的卫星" in moon.tuned  # right, and not whole
assert moon in damage.garbled

# The figure of the ablation, and the numbers in the sentences around it.
mean = {}
for trial in found["runs"]:
    for what in ("name", "whole", "right"):
        mean.setdefault((trial["factor"], trial["steps"], trial["general_rows"], what), []).append(100 * trial[what])
mean = {key: sum(each) / len(each) for key, each in mean.items()}
assert (
    f"{mean['before', 100, 0, 'whole']} whole answers became {mean['general rows', 100, 600, 'whole']} with 600" in text
)
assert mean["general rows", 100, 1200, "whole"] <= mean["general rows", 100, 600, "whole"]
quarter = [100 * trial["name"] for trial in found["runs"] if trial["factor"] == "lower rate" and trial["rate"] < 6e-4]
assert f"{mean['fewer steps', 25, 0, 'name']:.0f} % and {sum(quarter) / len(quarter):.0f} %" in text
assert mean["smaller rank", 100, 0, "whole"] < mean["before", 100, 0, "whole"]
assert mean["smaller rank and alpha", 100, 0, "whole"] < mean["before", 100, 0, "whole"]
now = [trial for trial in found["runs"] if trial["factor"] == "now"]
assert sorted(round(100 * trial["whole"]) for trial in now) == [95, 96]
assert "keep 95 or 96 of 97" in text
assert {(trial["steps"], trial["general_rows"], trial["rank"], trial["alpha"]) for trial in now} == {(150, 600, 8, 32)}

# Resumed: losses and adapter to the last bit.
assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in unbroken]
assert all(torch.equal(one, other) for one, other in zip(careless.parameters(), student.parameters(), strict=True))

# What the table of faults says.
said_why = []
for attempt in (
    lambda: practise("unlabelled", rows=[{**row, "labels": [-100] * row["length"]} for row in toy_rows]),
    lambda: refuse_many_processes({"WORLD_SIZE": "2"}),
):
    try:
        attempt()
    except (TrainingStoppedError, RuntimeError) as error:
        said_why.append(str(error))
assert len(said_why) == 2
assert "has no label" in said_why[0]
assert said_why[0].endswith("checkpoint-0.")
assert "plain python" in said_why[1]

# Numbers that were measured elsewhere.
results = project / "benchmarks" / "results"
sides = {
    row["what"]: row["ms"] for row in map(json.loads, (results / "side_by_side_h100.jsonl").read_text().splitlines())
}
assert "{} and {} ms a step with every block checkpointed".format(*sides["all"]) in text
assert "checkpointed, {} and {} with none; the code of 2023: {} and {}".format(*sides["none"], *sides["2023"]) in text
pair = [json.loads(line) for line in (results / "two_gpus_h100.jsonl").read_text().splitlines()]
even = {line["micro_batches"]: line["ms"] for line in pair if line["figure"] == "overlap" and line["cut"] == [14, 14]}
(planned,) = (line["ms"] for line in pair if line["figure"] == "planned")
assert f"{even[1]:.0f} ms a step in one part, {even[8]:.0f} in eight, {planned:.0f} as planned" in text
