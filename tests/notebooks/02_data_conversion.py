"""Checks of notebook 02, run in its kernel after the last cell: variables there, and numbers in its text."""

from pathlib import Path

from thuglm.modeling_chatglm import make_visible

text = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(Path("02_data_conversion.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)

# The parts built by hand give what the helpers give.
assert differing == 0
assert len(lesson) == report.rows_valid
assert all(bool((ours[key] == theirs[key]).all()) for key in ("input_ids", "attention_mask", "labels"))
assert abs(loss_of(four) - weighted) < 1e-4
spread = max(alone) - min(alone)
assert spread > 0.1, "rows of one loss would prove nothing"

# Files and rows.
assert (kept, salvaged.rows_valid) == (10, 31)
assert any(row["output"] == "N/A" for row in rows)
assert report.rows == report.rows_valid + sum(report.rejected.values())
assert report.output.with_suffix(".report.json").is_file()
assert (chosen.rows, chosen.rows_valid) == (5, 2)
assert build_prompt("What is 2+3?", turns) == "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：What is 2+3?\n答："

# Labels, mask, padding.
ids, labels = example["input_ids"], example["labels"]
start = ids.index(tokenizer.bos_token_id) + 1
assert labels == [-100] * start + ids[start:]
places = range(len(ids))
sees = make_visible(torch.tensor([ids]), config)[0].reshape(len(ids), -1).tolist()
assert sees == [[there < start - 1 or there <= here for there in places] for here in places]
original = encode_example(tokenizer, {"instruction": "What is 2+3?", "output": "2+3=5."}, train_sop=True)
assert original["labels"].count(-100) == labels.count(-100) - 1
assert batch["input_ids"].shape[1] % 8 == 0
assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()

# What breaks the equality, and what does not.
apart = {name: abs(loss - loss_of(four)) for name, loss in ways.items()}
assert {name for name, gap in apart.items() if gap > 1e-2} == {"on the left, no mask", "mean of the rows' means"}
assert all(gap < 1e-4 for name, gap in apart.items() if name not in ("on the left, no mask", "mean of the rows' means"))

# The wrong ways: every loss falls, and only labels that are shifted twice can be heard.
assert losses["right"] < 0.05 < 0.5 < min(loss for name, loss in losses.items() if name != "right")
assert all(last < min(losses[name], 0.1) for name, (last, _) in trained.items())
said = {name: answer for name, (_, answer) in trained.items()}
assert said.pop("shifted twice") not in set(said.values()) == {lesson[0]["output"]}
assert (wrong["labels on the prompt too"] != -100).sum() > (wrong["right"] != -100).sum()

# Limits: what the text says of the real data set.
limits = {cost["limit"]: cost for cost in corpus["corpora"]["all"]["as found"]["limits"]}
assert limits[512]["dropped"] / corpus["corpora"]["all"]["as found"]["valid"] < 1e-3
assert (
    f"{corpus['corpora']['all']['as found']['valid']:,} valid rows in {corpus['corpora']['all']['as found']['files']} files"
    in text
)
assert tokens.examples == tokens.kept + sum(tokens.dropped.values())
assert max(dataset["length"]) <= MAX_LENGTH


# Tokens are kept by what they depend on; the split is the same each time.
def token_file(**changed):
    settings = {"template": TEMPLATE, "max_length": MAX_LENGTH} | changed
    return encode_file(report.output, tokenizer, **settings).cache_files[0]["filename"]


other = "chatglm" if TEMPLATE == "alpaca" else "alpaca"
assert token_file() == token_file() == dataset.cache_files[0]["filename"]
assert len({token_file(), token_file(template=other), token_file(train_sop=True)}) == 3
assert not shared
assert leaked > 100
assert split_by_prompt(dataset, HOLD_OUT)[1]["input_ids"] == held_out["input_ids"]
written = [json.loads(line) for line in mine.output.read_text(encoding="utf-8").splitlines()]
assert token_report(my_tokens).examples == sum(1 + len(row.get("history", [])) for row in written)

# With the real tokenizer or other settings nothing is promised, and nothing compared.
usual = (str(project / "data" / "alpaca_tiny.json"), "chatglm", 32, 0.05, 8)
if run.is_tiny and (str(SOURCE), TEMPLATE, MAX_LENGTH, HOLD_OUT, BATCH) == usual:
    assert (report.rows, report.rows_valid, tokens.kept) == (2737, 2737, 2624)
    assert f"| 0 of {len(lesson):,} differ |" in text
    assert f"| {round(100 * tokens.targets / tokens.tokens)} % |" in text
    assert f"| {share[0]:.0%} / {share[1]:.0%} |".replace("%", " %") in text
