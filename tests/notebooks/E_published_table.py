"""Checks of appendix E, run in its kernel after the last cell."""

from pathlib import Path

text = Path("E_published_table.ipynb").read_text(encoding="utf-8")

assert "114,599 rows to train on, 1,070 to answer" in text
assert (adgen.PUBLISHED["bleu4"], adgen.PUBLISHED["rougel"]) == (7.62, 24.80)
assert steps * batch == 48_000
assert 0.5 < hours < 3
assert f"at temperature {adgen.GENERATION['temperature']} with top-p {adgen.GENERATION['top_p']}" in text

# Rows: the long one is cut to what the authors keep, the short one is whole, none is lost.
kept = [len(tokenizer.encode(row["output"], add_special_tokens=False)) for row in prepared.rows]
assert (len(kept), prepared.cut) == (2, 1)
assert max(kept) <= adgen.MOST_TOKENS == 64 - 2
assert prepared.rows[0]["output"] == source[0]["summary"]
assert source[1]["summary"].startswith(prepared.rows[1]["output"][:40])

# The rehearsal: two answers, and nothing of it where the real training would look for its checkpoints.
assert (scores.answers, len(texts)) == (2, 2) or ADGEN
assert tiny.output == folder
assert (folder / "adgen" / "adapter_model.safetensors").is_file()
assert (run.output / "adgen_checkpoints").exists() == bool(ADGEN)
