"""Checks of notebook 01, run in its kernel after the last cell: variables there, and numbers in its text."""

import json
import re
from pathlib import Path

text = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(Path("01_download_weights.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)


def gib(size):
    """Two digits, as the text has them."""
    return f"{size / 2**30:.2f}"


# What was loaded.
assert report.ok
assert report.files in (8, 9)  # with as many .bin or one safetensors less, and the tokenizer
assert all(parameter.device.type != "meta" for parameter in model.parameters())
assert all(parameter.dtype == run.dtype for parameter in model.parameters())  # LayerNorms, too
assert len(names) == len(set(names))  # no tensor is in two files
assert entries["transformer.word_embeddings.weight"].shape == (config.vocab_size, config.hidden_size)
assert tied or model.hf_device_map["lm_head"] != model.hf_device_map["transformer.word_embeddings"]
assert (places, places - parameters) == (len(dict(model.named_parameters())) + tied, tied)
if path.suffix == ".bin":
    # A block stores its rotation once more than it has parameters; the head is stored, too.
    assert len(names) == places - 1 + config.num_layers + 1
    stored = torch.load(list_shards(run.folder)[-1], mmap=True, weights_only=True)["lm_head.weight"]
    assert torch.equal(stored, read_tensor(path, entries["transformer.word_embeddings.weight"]))
assert reply

# The real tokenizer gives the published ids; the stand-in of tiny ChatGLM has ids of its own.
if (run.folder / "ice_text.model").stat().st_size == published["ice_text.model"]["size"]:
    mine = ChatGLMTokenizer.from_pretrained(run.folder)
    assert all(mine.encode(case["text"]) == case["ids"] for case in read_manifest(PUBLISHED)["tokenizer_known_ids"])

# The parts built by hand give the numbers of the model.
assert seen.sum() == 10 * 19 + 9 * 10 / 2
assert positions[0].any()
assert walk_difference < 1e-3 < walk.logits.abs().max()
broken = forward(toy, [*ids[:5], ids[6], ids[5], *ids[7:]])  # or a forward that ignores its input would pass
assert (broken - logits).abs().max() > 0.1
assert walk.logits[0, walker].argmax() == ids[walker + 1]
assert written.tolist() == ids[start + 1 :]
assert after_hole < 0.01
spreads = [state.std(correction=0).item() for state in states[1:-1]]
assert f"between {min(spreads):.1f} and {max(spreads):.1f}" in text

# Where the gigabytes are.
assert block == sizes["transformer.layers.0"] == part_bytes(real)["transformer.layers.27"]
untied = sum(sizes.values())
assert (untied - sizes["lm_head"]) // 2 == 6_173_286_400
assert round(untied / sizes["lm_head"]) in (12, 13)  # "a twelfth"
assert f"saves {sizes['lm_head'] / 1e9:.2f} GB" in text
assert sum(facts["size"] for name, facts in published.items() if name != "ice_text.model") == 13_416_906_785
assert total == 13_419_613_034

# Loading file by file: killed in the sixth, by both readings of "12.7 GB" and with nothing taken before.
shard_bytes = [published[name]["size"] for name in shards]
peaks = [sum(shard_bytes[:n]) + 2 * size for n, size in enumerate(shard_bytes)]
for nothing_fits_above, before in ((RAM, TAKEN), (12.7e9, 0)):
    assert [peak + before > nothing_fits_above for peak in peaks] == [False] * 5 + [True] * 3
assert (number, f"{peak / 2**30:.0f}") == (6, "13")
assert "need 13 GiB. Five of eight files are done: 62 %" in text

# Tied on two GPUs.
for objective, copies in (("memory", 1), ("speed", 2)):
    plan = plan_device_map(real, ["T4", "T4"], 4, 1024, objective=objective)
    held = [terms["weights"] + terms["embedding"] for terms in plan.breakdown]
    assert sum(held) == untied - (2 - copies) * sizes["lm_head"]
assert f"{gib(held[0])} and {gib(held[1])} GiB |" in text
assert sum(held) // 2 == 6_707_929_088
assert f"Kept twice, it costs {gib(sizes['lm_head'])} GiB" in text

# The measured column: cold page cache, .bin, everything to one GPU (`benchmarks/load.py`).
lines = (project / "benchmarks" / "results" / "load_h100.jsonl").read_text().splitlines()
found = [json.loads(line) for line in lines if '"bin"' in line and '"half"' not in line and '"warm"' not in line]
cold = {line["step"]: line for line in found}
assert " / ".join(f"{cold[step]['seconds']:.1f} s" for step in ("plain", "verify", "load")) in text
grown = cold["load"]["rss_growth_bytes"] - cold["load"]["import_bytes"]
assert f"| less than 0.1 GiB | {gib(grown)} GiB |" in text
assert f"it grew by {gib(grown)} GiB while {cold['load']['read_bytes'] / 1e9:.2f} GB went through it" in text
assert gib(untied - sizes["lm_head"]) == "11.50"

# The column of this machine.
if run.is_tiny:
    assert (f"{report.bytes / 1e6:.1f}", f"{loading.read_bytes / 1e6:.1f}") == ("4.3", "3.6")
    assert sum(p.numel() for p in model.parameters()) == 1_785_088 or len(run.devices) > 1
    assert f"{sum(p.numel() for p in model.parameters()) * 4 / 2**20:.1f}" == "6.8" or len(run.devices) > 1
    assert added - kept < 0.1 * 2**30 or run.devices != ["cpu"]
    assert all(same)
elif report.bytes > 12e9:
    assert round(report.bytes / 1e9, 2) in (12.35, 13.42)  # as safetensors or .bin
    assert round(loading.read_bytes / 1e9, 2) == 12.35

# What a reader meets.
assert len(re.findall(r"<details>", text)) == 10
assert text.count("**Predict first") == 3
