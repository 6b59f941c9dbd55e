"""Checks of notebook 06, run in its kernel after the last cell: variables there, and numbers in its text."""

from pathlib import Path

from glmhelpers.cost_model import busy_share

text = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(Path("06_beyond_one_machine.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)

# By hand, with the engine, with data parallel: the step of one process.
size = max(slope.abs().max().item() for slope in right)
assert size > 0.1  # or two empty gradients would be equal
assert len(first["by hand"][1]) == len(second["by hand"][1]) == len(right) / 2
assert max(pipeline_differences.values()) < 1e-6
assert abs(second["by hand"][0].item() - right_loss) < 1e-5
assert abs(second["engine"][0].item() - right_loss) < 1e-5
assert abs(sum(shares) - right_loss) < 1e-5
assert min(shares) > 0.1
assert equal
assert data_difference < 1e-6

# Orders of work: the same time, other memory.
assert alive == {"GPipe": [8] * 4, "1F1B": [4, 3, 2, 1]}
ends = {name: max(task.end for task in tasks) for name, tasks in played.items()}
assert ends["GPipe"] == ends["1F1B"] == 33
idle = {name: 1 - busy_share(tasks) for name, tasks in played.items()}
assert all(abs(share - 3 / 11) < 1e-9 for share in idle.values())
assert f"{3 / 11:.0%}".replace("%", " %") in text
for name, order in orders.items():
    for ranks, parts in ((2, 4), (3, 5), (4, 8)):
        found = play([order(rank, ranks, parts) for rank in range(ranks)])
        assert len(found) == 2 * ranks * parts
        assert abs(1 - busy_share(found) - (ranks - 1) / (parts + ranks - 1)) < 1e-9, name

# Bytes that are sent.
lora = 28 * 8 * (4096 + 3 * 4096) * 4
assert f"{lora / 2**20:.0f} MiB of gradients" in text
assert f"{6_173_286_400 * 2 / 2**30:.1f} GiB in float16" in text

# What notebook 03 measured, in its own words.
third = Path("03_device_map.ipynb").read_text(encoding="utf-8")
assert "| 16 × 56 | 84 | 132 | 281 | 447 |" in third
assert "took 84 ms on two H100s in one part, and 447 ms in eight" in text

# Killed and taken up: rank 1 was there, the run went on from step 6, and lost nothing.
assert len(killed) == 1
assert not psutil.pid_exists(killed[0])
assert any(f"goes on from step 6 of {STEPS}" in line for line in lines)
assert sum(line.startswith("step 8 ") for line in lines) == 2
assert list(one) == list(two) == list(range(2, STEPS + 1, 2))
on_cpu = run.devices == ["cpu"]
assert loss_difference < (2e-4 if on_cpu else 0.1)
assert gap < (1e-3 if on_cpu else 1)
assert sorted(loaded) == sorted(trained)
assert max(weight.norm() for weight in loaded.values()) > 0
assert NEW_NAME in answer.text or not run.is_tiny

# One sentence each.
assert len(refusals) == len(wrong)
assert all("\n" not in sentence and len(sentence) > 30 for sentence in refusals)

# Which road: what the text says of the tables, and the figure on paper.
by_name = {shape: {road.name: road for road in found} for shape, found in roads.items()}
long, short = (by_name[shape] for shape in ((24, 1024), (16, 56)))
assert not long["dp 2"].fits
assert short["dp 2"].fits
assert roads[16, 56][0].name == "dp 2"
assert long["one process"].plan.setting.in_flight == 2
assert not long["one process"].plan.checkpointed_layers
assert not long["pp 2, 1F1B"].plan.checkpointed
assert len(long["pp 2, GPipe"].plan.checkpointed) > 14
first_three = sorted(road.seconds for road in long.values() if road.fits)[:3]
assert first_three[-1] == long["one process"].seconds < 1.1 * first_three[0]
assert min(long[name].busy for name in ("one process", "pp 2, 1F1B")) > 0.85
known = {(point.way, point.gpus): point for point in points}
assert all(abs(point.simulated / point.seconds - 1) < 0.02 for point in points if point.seconds)
assert min((point for point in points if point.gpus == 8), key=lambda point: point.tokens_per_s).way == "tp"
assert max((point for point in points if point.gpus == 64), key=lambda point: point.tokens_per_s).way == "dp"
assert known["fsdp", 64].sent_bytes > 100 * known["dp", 64].sent_bytes
assert known["tp", 8].busy < 0.5
assert not known["pp", 32].fits
# Two bytes of gradient and eight of Adam for two of weights.
assert "five times as large as the weights" in text
