"""Checks of appendix F, run in its kernel after the last cell: variables there, and numbers in its text."""

from pathlib import Path

text = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(Path("F_p_tuning.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)

# By hand: one head as the text's formula says, and a whole model as peft computes it.
assert torch.allclose(joined, mixed, atol=1e-5)
assert same < 1e-4 < changed

# At full size.
numbers = {name: plan.breakdown[0]["lora"] // 4 for name, plan in plans.items()}
assert list(numbers.values()) == [3_670_016, 3_670_016, 29_360_128]
assert all(f"{number:,}" in text for number in (3_670_016, full.num_layers * 2 * full.hidden_size))
totals = [plan.total_bytes[0] / 2**30 for plan in plans.values()]
assert abs(totals[1] - totals[0]) < 0.1 < totals[2] - totals[1]
try:
    plan_device_map(full, ["T4", "T4"], 1, 64, prefix_length=128, prefix_projection=full.hidden_size)
except DoesNotFit:
    pass
else:
    raise AssertionError("the text says that a projected prefix does not fit on two T4s")

# Measured: every tensor of a step.
for name, size in measured.items():
    assert abs(predicted[name] / size - 1) < 0.005
trainable = {name: count_parameters(student)[0] for name, (student, _) in students.items()}
assert trainable["LoRA"] == trainable["prefix"] == 32_768

# What both learnt and forgot.
assert logs["LoRA"][0]["loss"] < logs["prefix"][0]["loss"]
assert logs["LoRA"][-1]["loss"] < logs["prefix"][-1]["loss"] < 0.2
assert named_share["LoRA"] >= named_share["prefix"] >= 0.6
assert still["LoRA"].after > still["prefix"].after
assert still["LoRA"].before == still["prefix"].before
assert proof.ok
assert "cannot be merged" in refused
