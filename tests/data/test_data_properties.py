"""Whatever a file holds: a report that adds up or an error that names the file; never a crash, never a lost row."""

import csv
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmhelpers.data import json_recovery as salvage
from glmhelpers.data.cleaning import NO_INPUT
from glmhelpers.data.convert import convert_alpaca

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)

NAMES = ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.zip", "a")
KEYS = st.sampled_from(["instruction", "input", "output", "prompt", "response", "history", "system", "id", ""])
# Text of every kind that can stand in a file: no half characters, and no control characters but tab and newline.
plain = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\t\n"), max_size=20)
every_text = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | every_text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(), inner))
rows = st.dictionaries(KEYS, values, max_size=5) | st.fixed_dictionaries({"instruction": values, "output": values})
good_rows = st.fixed_dictionaries(
    {"instruction": plain.filter(str.strip), "input": plain, "output": plain.filter(str.strip)}
)


def run(content: bytes, name: str, **options):
    """(report, rows written), or (None, []) if a ValueError named the file."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, name), Path(folder, "out", "train.jsonl")
        source.write_bytes(content)
        report, message = None, ""
        try:
            report = convert_alpaca(source, output, **options)
        except ValueError as error:
            message = str(error)
        if report is None:
            assert name in message
            assert not output.exists()
            return None, []
        lines = output.read_text("utf-8").splitlines()
        assert len(lines) == report.rows_valid
        for file in report.files:
            assert file.rows == file.valid + sum(file.rejected.values())
            assert min([0, file.valid, *file.rejected.values()]) == 0
        written = [json.loads(line) for line in lines]
        for row in written:
            assert row["instruction"].strip()
            assert row["output"].strip()
        return report, written


def indented(text: str) -> str:
    """Without blanks around it, but with those before the first line if they are an indentation."""
    body, blanks = text.strip(), len(text) - len(text.lstrip())
    before = text[len(text[:blanks].rstrip(" \t\u3000\xa0")) : blanks] if body else ""
    return before + body if "\n" in body or "\t" in before or len(before) > 1 else body


def expected(row: dict) -> dict:
    return {
        "instruction": row["instruction"].strip(),
        "input": indented(row["input"]),
        "output": indented(row["output"]),
    }


@quick
@given(st.binary(max_size=300), st.sampled_from(NAMES))
def test_arbitrary_bytes(content, name):
    run(content, name)


PIECES = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\n", b"\r", b"instruction", b'"output": "x"', b"\xff"]
PIECES += [b'{"instruction": "a", "output": "b"}', b"PAR1", b"PK\x03\x04", b"\xef\xbb\xbf", "你".encode(), b"\x00"]


@quick
@given(st.lists(st.sampled_from(PIECES), max_size=40), st.sampled_from(NAMES))
def test_arbitrary_pieces_of_files(pieces, name):
    run(b"".join(pieces), name)


@quick
@given(st.lists(rows | values, max_size=8), st.booleans(), st.booleans())
def test_arbitrary_json(items, lines, dedupe):
    content = "\n".join(map(json.dumps, items)) if lines else json.dumps(items)
    report, _ = run(content.encode(), "a.json", dedupe=dedupe)
    if report is None:
        return
    # One line that is no object may make the whole look like an array of its own: what counts is that it adds up.
    if not lines:
        assert report.rows == len(items)


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


@quick
@given(st.lists(st.fixed_dictionaries({"instruction": values, "output": values}), min_size=1, max_size=8))
def test_valid_is_what_has_an_instruction_and_an_output(items):
    valid = [row for row in items if is_text(row["instruction"]) and is_text(row["output"])]
    # Raw lone surrogates in the range that stands for undecodable bytes are refused with those.
    valid = [r for r in valid if not any("\udc80" <= c <= "\udcff" for c in r["instruction"] + r["output"])]
    report, _ = run(json.dumps(items).encode(), "a.json")
    assert (report.rows_valid if report else 0) == len(valid)


@quick
@given(st.lists(good_rows, min_size=1, max_size=8), st.sampled_from(["array", "lines", "csv", "parquet", "rows"]))
def test_good_rows_come_back_from_every_format(items, form):
    if form == "rows":
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "a.jsonl")
            convert_alpaca(iter(items), output)
            written = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    else:
        _, written = run(write(items, form), {"csv": "a.csv", "parquet": "a.parquet"}.get(form, "a.json"))
    assert [{**row, "input": ""} for row in written] == [{**expected(row), "input": ""} for row in items]
    for row, item in zip(written, items, strict=True):
        assert row["input"] == expected(item)["input"] or row["input"] == ""


def write(items: list[dict], form: str) -> bytes:
    if form == "parquet":
        file = io.BytesIO()
        pyarrow.parquet.write_table(pa.Table.from_pylist(items), file)
        return file.getvalue()
    if form == "csv":
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, ["instruction", "input", "output"])
        table.writeheader()
        table.writerows(items)
        return text.getvalue().encode()
    if form == "lines":
        return "\n".join(json.dumps(item, ensure_ascii=False) for item in items).encode()
    return json.dumps(items, ensure_ascii=False, indent=1).encode()


BROKEN = [
    '{"instruction": "say "hi" twice", "input": "", "output": "x"}',
    '{"instruction": "a", "input": "", "output": "he said "well", and "so""}',
    '{"instruction": "a", "input": "", "output": "no end}',
    '{"instruction": "a" "input": "", "output": "b"}',
    '{"instruction": a, "input": "", "output": "b"}',
    '{"instruction": "a", "input": "", "output": "b\\x"}',
]


@quick
@given(st.lists(good_rows | st.sampled_from(BROKEN), min_size=1, max_size=10), st.sampled_from([None, 2]))
def test_broken_rows_cost_only_themselves(items, indent):
    good = [item for item in items if isinstance(item, dict)]
    texts = [item if isinstance(item, str) else json.dumps(item, indent=indent) for item in items]
    report, written = run(("[\n" + ",\n".join(texts) + "\n]").encode(), "a.json")
    if not good:
        assert report is None
        return
    assert [row["output"] for row in written] == [indented(item["output"]) for item in good]
    assert report.rejected == ({"broken": len(items) - len(good)} if len(items) > len(good) else {})
    lines = [1 + sum(text.count("\n") + 1 for text in texts[:i]) + 1 for i, t in enumerate(items) if isinstance(t, str)]
    assert [problem.line for problem in report.files[0].problems] == lines


@quick
@given(
    st.lists(good_rows | st.sampled_from([*BROKEN, "words", "5", "tru", "[1]", "}", "{"]), min_size=4, max_size=20),
    st.sampled_from([None, 2]),
    st.sampled_from(["[", ""]),
    st.integers(1, 60),
)
def test_the_size_of_the_window_changes_nothing(items, indent, start, times):
    """Rows, line numbers and repairs are those that a window over the whole file gives, wherever the rows are cut."""
    size, long = 512, [{**item, "id": [item["output"]] * times} if isinstance(item, dict) else item for item in items]
    texts = [item if isinstance(item, str) else json.dumps(item, indent=indent) for item in long]
    text = start + ",\n".join(texts) + "]"

    def read():
        notes = salvage.Notes()
        return list(salvage.read_json(io.StringIO(text, newline="\n"), notes)), notes

    whole = read()
    with mock.patch.object(salvage, "WINDOW", size), mock.patch.object(salvage._Window.fill, "__defaults__", (size,)):
        assert read() == whole


@quick
@given(st.lists(good_rows | st.sampled_from(["{broken", "words", '"', "}"]), min_size=1, max_size=10))
def test_broken_lines_cost_only_themselves(items):
    good = [item for item in items if isinstance(item, dict)]
    texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
    report, written = run("\n".join(texts).encode(), "a.jsonl")
    assert [row["output"] for row in written] == [indented(item["output"]) for item in good] if good else report is None


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 4))
def test_dedupe_is_the_first_of_each(numbers, files):
    items = [{"instruction": f"q{n}", "input": "", "output": "a"} for n in numbers]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "s")
        source.mkdir()
        for part in range(files):
            (source / f"{part}.json").write_text(json.dumps(items[part::files]))
        report = convert_alpaca(source, Path(folder, "a.jsonl"), dedupe=True)
        written = [json.loads(line) for line in Path(folder, "a.jsonl").read_text().splitlines()]
    order = [item for part in range(files) for item in items[part::files]]
    assert written == list({row["instruction"]: row for row in order}.values())
    assert report.rows == len(items)


@pytest.mark.parametrize("text", sorted(NO_INPUT))
def test_placeholders_are_in_the_form_they_are_looked_up_in(text):
    assert text == " ".join(text.casefold().split())
