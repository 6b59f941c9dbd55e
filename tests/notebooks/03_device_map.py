"""Checks of notebook 03, run in its kernel after the last cell: variables there, and numbers in its text."""

import dataclasses
import json
import re
from pathlib import Path

from glmhelpers.cost_model import find_gpu

text = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(Path("03_device_map.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)


def gib(size):
    """Two digits, as the text has them."""
    return f"{size / 2**30:.2f}"


# The parts built by hand give the numbers of the helpers.
assert split_difference == 0.0
assert torch.allclose(both["by hand"][0], both["run_step"][0], rtol=1e-6)
assert gradient_difference < 1e-6
assert both["run_step"][1].abs().max() > 1e-3  # or two empty gradients would be equal
assert out.shape == ours.shape
assert out.device == torch.device(pair[1])

# The bubble: formula, simulation, and what the two H100s measured and the text quotes.
for count in (1, 2, 3, 5, 8):
    assert abs(1 - busy_share(schedule([StageTime(1.0, 2.0)] * 3, count)) - bubble(3, count)) < 1e-9
lines = [json.loads(x) for x in (project / "benchmarks/results/two_gpus_h100.jsonl").read_text().splitlines()]
even = [x for x in lines if x["figure"] == "overlap" and x["cut"] == [14, 14]]
idle = [f"{sum(x['idle_share']) / 2:.0%}".rstrip("%") for x in even]
assert f"idle {', '.join(idle[:-1])} and {idle[-1]} %" in text
assert "| 24 × 1024 | " + " | ".join(f"{x['ms']:.0f}" for x in even) in text
assert f"idle {1 - busy_share(piped.schedule):.0%}".replace("%", " %") in text
assert busy_share(naive.schedule) <= 0.5
assert piped.seconds < naive.seconds

# What the catalogue plans for the two H100s that were calibrated, what was planned with their own rates, and measured.
kept = [json.loads(x) for x in (project / "benchmarks/results/calibrate_h100.jsonl").read_text().splitlines()]
place, choice = next(
    (i, x) for i, x in enumerate(kept) if (x["what"], x.get("rows"), x.get("blocks")) == ("choice", 4, [14, 14])
)
rates = [x["rates"][0] for x in kept[:place] if x["what"] == "rates"][-1]
others = choice["others_ms"]
assert f"{others['2 GPUs, 4 parts']:.0f} ms a step, where one of them takes {others['1 GPUs, 1 parts']:.0f}." in text
assert f"has {choice['micro_batches']} parts: {choice['ms']:.0f} ms, the best" in text
assert choice["ms"] <= min(others.values())
host = [1e3 * seconds for name, seconds in rates.items() if name.startswith("launch")]
assert f"found {min(host):.1f} to {max(host):.1f} ms" in text
card = dataclasses.replace(find_gpu("H100"), **rates)
for gpu, size, parts, used in (("H100", (4, 1024), 4, 2), (card, (4, 1024), 2, 2), (card, (16, 56), 1, 1)):
    calibrated = plan_device_map(config, [gpu] * 2, *size, label_share=0.5)
    assert (calibrated.micro_batches, len(calibrated.stage_times)) == (parts, used)

# Bytes by hand.
assert (block, total) == (shape.block_parameters, 6_173_286_400)
assert by_hand_bytes[0] == by_hand_bytes[1]
assert lora == 28 * 8 * (4096 + 3 * 4096) * 4 == sum(terms["lora"] for terms in plan.breakdown)
assert f"another {total * 10 / 2**30:.0f} GiB" in text
assert measured_kept == planned_kept
assert all(sum(terms.values()) == peak for terms, peak in zip(plan.breakdown, plan.peak_bytes, strict=True))

# The planner against all cuts, and why the cut is not in the middle.
assert (max(best.peak_bytes), len(best.blocks[0])) == (tried[cut], cut) == (min(tried.values()), 15)
assert 2 < head / block < 3
assert f"A block weighs {gib(2 * block)} GiB, the tied matrix {gib(2 * head)} GiB" in text
assert fast.fits
assert fast.seconds <= plan.seconds
one, four = (plan_device_map(config, ["T4"], 4, 1024, in_flight=flying) for flying in (1, 4))
assert f"{fast.seconds:.1f} s a step against {one.seconds:.1f} below" in text
assert f"{len(four.checkpointed_layers)} of its 28 blocks again, and a step would take {four.seconds:.1f} s" in text

# Micro-batches in flight: what the planner takes by itself, and what was measured.
alone = plan_device_map(config, ["T4", "T4"], 24, 1024)
assert (alone.setting.in_flight, alone.seconds) == (2, long.seconds)
measured_lanes = [
    json.loads(x) for x in (project / "benchmarks/results/flight_h200.jsonl").read_text(encoding="utf-8").splitlines()
]
ways = {x["way"]: x["ms"] for x in measured_lanes if (x["what"], x.get("rows")) == ("flight", 24)}
one_ms, all_ms, few_ms = (sum(ways[way]) / len(ways[way]) for way in ("one", "all", "few"))
assert f"{one_ms:.0f} ms in one part, {all_ms:.0f} with all parts in flight, {few_ms:.0f} in two lanes" in text
assert [explorer.device_map[f"transformer.layers.{layer}"] for layer in (15, 16)] == [0, 1]
# The explorer's diamond belongs to the very plan that was measured.
assert (ran.peak_bytes, [len(blocks) for blocks in ran.blocks]) == (seen["predicted_peak_bytes"], seen["cut"])
assert ran.setting.loss_chunk == seen["loss_chunk"]
check_device_map(config, chosen)

# The settings as they are committed: the table at the end, and sentences above pictures.
if gpus == two and (batch_size, seq_length) == (4, 1024):
    assert "memory plan, 4 × 1024 in 4 micro-batches on two | {} and {} GiB".format(*map(gib, plan.peak_bytes)) in text
    assert "slack and context | {} and {} GiB".format(*map(gib, plan.total_bytes)) in text
    # The sentence names the chunk of the plan that the picture below it shows.
    assert f"or {chunk} in plans for the least memory" in text
    kept, again = 28 * unit_6b, 28 * (unit_6b + cost.saved)
    assert f"that is {kept / 2**30:.1f} GiB in place of {again / 2**30:.1f}" in text
placed = next(x for x in lines if x["figure"] == "placement" and x["batch"] == 4)
assert "{} and {} GiB |".format(*map(gib, placed["peak_bytes"])) in text
assert [int(x) for x in re.findall(r"largest batch at 1024 tokens on (?:two|one) \| (\d+)", text)] == [
    rows,
    largest_batch(config, ["T4"], 1024),
]

# On this machine: the bytes of the parameters, device by device.
assert sorted(counted.values()) == sorted(terms["weights"] + terms["embedding"] for terms in predicted.breakdown)
