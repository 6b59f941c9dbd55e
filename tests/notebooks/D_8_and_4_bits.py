"""Checks of appendix D, run in its kernel after the last cell: variables there, and numbers in its text."""

from pathlib import Path

from glmhelpers.cost_model import find_gpu

text = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(Path("D_8_and_4_bits.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)

# Packed and unpacked by hand: the rounding is at most half a step, and the values of NF4 are the published ones.
steps, scale = pack8(weight)
assert steps.dtype == torch.int8
assert ((weight - unpacked[8]).abs() <= 0.5001 * scale).all()
assert torch.allclose(unpack8(*pack8(unpacked[8])), unpacked[8])
published = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
published += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
assert torch.allclose(LEVELS, torch.tensor(published), atol=1e-5)
assert len(pack4(weight)[0].unique()) == 16
assert 0.001 < errors[8] < 0.02 < errors[4] < 0.15
assert same_level is None or same_level > 0.999  # the others lie in the middle between two values
assert known[16] == known[8] == 1.0
assert known[4] >= 0.8

# What was measured, and what the text makes of it.
assert measured[16]["ms"] < measured[4]["ms"] < measured[8]["ms"]
assert 2.5 < extra[8] / extra[4] < 3.5
traffic = 4 * numbers / find_gpu("H100").bandwidth
assert "a third of what was measured" in text
assert abs(1000 * traffic / extra[4] - 1 / 3) < 0.03
assert most[16] < most[8] < most[4]
assert why_not() or stored[4] < stored[8] < stored[16]
