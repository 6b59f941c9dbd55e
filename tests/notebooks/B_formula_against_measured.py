"""Checks of appendix B, run in its kernel after the last cell."""

from pathlib import Path

text = Path("B_formula_against_measured.ipynb").read_text(encoding="utf-8")

# Every run, not only the mean: the formula is to be right case by case.
low = [round(100 * (1 - guess / case["peak_bytes"]), 2) for case, guess in zip(measured, today, strict=True)]
assert len(measured) == 17
assert f"Low by {min(low)} to {max(low)} %" in text

# One setting on two cards: they differ by the two workspaces of cuBLAS, each about 24 MiB larger.
assert (measured[2]["batch"], measured[2]["length"], measured[2]["micro_batches"]) == (4, 1024, 1)
assert on_h100 == today[2]
assert round((on_h100 - on_t4) / 2**20) == 48
assert f"held {measured[2]['peak_bytes'] / 2**30:.2f} GiB" in text

assert [case["batch"] for case in placed] == [4, 8, 67]
assert all(abs(difference) < 0.0005 for case in placed for difference in case["difference"])

off = [guess / (case["ms"] / 1e3) - 1 for guess, case in zip(guesses, overlap, strict=True)]
assert f"{off[0]:+.0%}, {off[-1]:+.0%}" == "+2%, -2%"
assert f"{guesses[0] / guesses[-1]:.1f}, {overlap[0]['ms'] / overlap[-1]['ms']:.1f}" == "1.7, 1.6"

# All logits at once: the card with fewer blocks is the fuller one.
assert whole_loss.peak_bytes[1] > whole_loss.peak_bytes[0]
