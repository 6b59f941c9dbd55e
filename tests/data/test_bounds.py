"""What unpacks to far more than its size is refused by name, before memory is filled; the other files go on."""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmhelpers.data import convert_alpaca, files, readers
from glmhelpers.data.json_recovery import Notes
from glmhelpers.utils import packed_sizes

GOOD = b'{"instruction": "a", "output": "b"}\n'


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "good.jsonl").write_bytes(GOOD)
    return folder


def refused(source, name):
    """What the report says of a file that must be refused, while its neighbour is read."""
    report = convert_alpaca(source, source.parent / "out.jsonl")
    by_name = {file.path.name: file for file in report.files}
    assert by_name["good.jsonl"].valid == report.rows_valid == 1
    assert by_name[name].status == "refused"
    return by_name[name].message


def table(outputs):
    return pa.table({"instruction": [f"q{n}" for n in range(len(outputs))], "output": outputs})


@pytest.mark.parametrize("neighbours", [0, 300])
@pytest.mark.parametrize("how", [{}, {"use_dictionary": False}, {"data_page_version": "2.0", "use_dictionary": False}])
def test_a_cell_that_is_too_large_is_refused_before_it_is_unpacked(source, monkeypatch, neighbours, how):
    monkeypatch.setattr(readers, "PAGE_BYTES", 2**22)
    cells = ["ok"] * neighbours + ["a" * 2**23] + ["ok"] * neighbours
    pa.parquet.write_table(table(cells), source / "x.parquet", compression="zstd", **how)
    assert (source / "x.parquet").stat().st_size < 2**20
    monkeypatch.setattr(pa.parquet.ParquetFile, "iter_batches", None)  # nothing may be unpacked
    said = refused(source, "x.parquet")
    assert "its column output holds a value, or a page of values, of 8,3" in said
    assert "take that row out" in said


def test_columns_that_nobody_asked_for_may_be_of_any_size(source, monkeypatch):
    monkeypatch.setattr(readers, "PAGE_BYTES", 2**20)
    rows = table(["ok", "fine"]).append_column("image", pa.array([b"1" * 2**22, b""]))
    pa.parquet.write_table(rows, source / "x.parquet")
    assert convert_alpaca(source, source.parent / "out.jsonl").rows_valid == 3


def test_a_long_value_costs_its_row_only(source, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    rows = table(["ok", "a" * 2000, "b" * 900, "c" * 950])
    pa.parquet.write_table(rows, source / "x.parquet")
    with pa.ipc.new_file(source / "y.arrow", rows.schema) as file:
        file.write_table(rows)
    report = convert_alpaca(source, source.parent / "out.jsonl")
    for file in report.files[1:]:
        assert (file.valid, dict(file.rejected)) == (3, {"broken": 1})
        assert file.problems[0].detail.startswith("its output is longer than 1,000 bytes (2,0")


@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=60),
    st.sampled_from(["1.0", "2.0"]),
    st.sampled_from(["NONE", "SNAPPY", "ZSTD", "GZIP"]),
    st.sampled_from(
        [
            {},
            {"use_dictionary": False},
            {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
            {"use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"},
        ]
    ),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_page_of_a_file_is_found(outputs, version, packed, encoding, statistics):
    """Page headers are read as their library writes them: as many values as there are rows, whatever the encoding."""
    file = io.BytesIO()
    how = {"data_page_version": version, "compression": packed, "write_statistics": statistics, **encoding}
    pa.parquet.write_table(table(outputs), file, data_page_size=16, write_batch_size=3, row_group_size=20, **how)
    facts, values = pa.parquet.ParquetFile(file).metadata, 0
    for group in range(facts.num_row_groups):
        chunk = facts.row_group(group).column(1)
        at = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
        end = at + chunk.total_compressed_size
        while at < end:
            file.seek(at)
            header, length = packed_sizes.page_header(file.read(2**16))
            at += length + header[3]
            values += header.get(5, header.get(8, {})).get(1, 0)
        assert at == end
    assert values == len(outputs)
    rows = list(readers.read_rows(io.BytesIO(file.getvalue()), "x.parquet", Notes(), {}, None))
    assert [row.value["output"] for row in rows] == outputs


def test_a_dictionary_of_long_values_is_read_a_few_rows_at_a_time():
    file = io.BytesIO()
    pa.parquet.write_table(table(["a" * 500_000, "b" * 500_000] * 20), file)
    assert readers._batch_rows(pa.parquet.ParquetFile(file).metadata, file, {"instruction", "output"}) <= 2**26 / 10**6


@pytest.mark.parametrize(
    "data", [b"", b"\x15", b"\x15\xff\xff", b"\x19\x00", b"\x18\x80\x80\x80\x80\x08a", b"\x1c" * 50]
)
def test_a_damaged_page_header_is_told(data):
    with pytest.raises(ValueError, match="damaged"):
        packed_sizes.page_header(data)


def test_no_rows_are_no_damage(source):
    pa.parquet.write_table(
        table([]).cast(pa.schema([("instruction", pa.string()), ("output", pa.string())])), source / "x.parquet"
    )
    assert [file.status for file in convert_alpaca(source, source.parent / "out.jsonl").files] == ["ok", "empty"]


def test_texts_that_were_written_as_bytes_are_read_and_other_bytes_are_not(source):
    rows = table([b"\xe7\xba\xa2", "蓝".encode("gb18030")])
    pa.parquet.write_table(rows, source / "x.parquet")
    report = convert_alpaca(source, source.parent / "out.jsonl")
    assert (report.rows_valid, report.files[1].problems[0].detail) == (2, "text that is not UTF-8")
    assert "红" in (source.parent / "out.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize(("name", "what"), [("x.jsonl", b"\0"), ("x.csv", b"\0"), ("x.json", b"["), ("x.jsonl", GOOD)])
def test_a_packed_file_that_unpacks_to_far_more_than_its_size_is_refused(source, monkeypatch, pack, name, what):
    monkeypatch.setattr(files, "MOST_UNPACKED", 2**17)
    ending = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[pack]
    packed = pack(what * (2**20 // len(what)))
    if len(packed) * files.LIKELY_RATIO > 2**20:
        monkeypatch.setattr(files, "LIKELY_RATIO", 10)
    (source / f"{name}{ending}").write_bytes(packed)
    said = refused(source, f"{name}{ending}")
    assert "it unpacks to more than" in said
    assert "unpack it yourself" in said


def test_a_zip_with_a_bomb_in_it_gives_its_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_UNPACKED", 2**17)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jsonl", bytes(2**24))
        archive.writestr("bomb.parquet", b"PAR1" + bytes(2**24))
        archive.writestr("good.jsonl", GOOD)
        archive.writestr("inner.jsonl.gz", gzip.compress(bytes(2**24)))
    report = convert_alpaca(tmp_path / "a.zip", tmp_path / "out.jsonl")
    said = {file.path.name: (file.status, file.message) for file in report.files}
    assert said.pop("good.jsonl")[0] == "ok"
    for status, message in said.values():
        assert status == "refused"
        assert "it unpacks to more than" in message


def test_a_member_that_is_longer_than_it_says_is_refused(tmp_path):
    rows = GOOD * 1000
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.jsonl", GOOD)
        archive.writestr("liar.jsonl", rows)
    data = (tmp_path / "a.zip").read_bytes()
    size, crc = len(rows).to_bytes(4, "little"), zlib.crc32(rows).to_bytes(4, "little")
    assert data.count(crc) == 2
    (tmp_path / "a.zip").write_bytes(data.replace(size, len(GOOD).to_bytes(4, "little")))
    report = convert_alpaca(tmp_path / "a.zip", tmp_path / "out.jsonl")
    liar = next(file for file in report.files if file.path.name == "liar.jsonl")
    assert (liar.status, liar.valid) == ("refused", 0)
    assert report.rows_valid == 1


def test_what_packs_well_and_is_not_large_is_read(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(GOOD * 10_000))  # 350 times as large
    assert convert_alpaca(tmp_path / "x.jsonl.gz", tmp_path / "out.jsonl").rows_valid == 10_000


def test_a_packed_table_is_read_and_a_large_one_must_be_unpacked_first(source, monkeypatch):
    pa.parquet.write_table(table(["one", "two"]), source / "x.parquet")
    (source / "x.parquet.gz").write_bytes(gzip.compress((source / "x.parquet").read_bytes()))
    (source / "x.parquet").unlink()
    assert convert_alpaca(source, source.parent / "out.jsonl").rows_valid == 3
    monkeypatch.setattr(readers, "TABLE_BYTES", 500)
    assert "a table of more than 500 bytes, and packed: unpack it first" in refused(source, "x.parquet.gz")


def write_arrow(path, rows, form="file", packed=None, **how):
    new = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[form]
    with new(path, rows.schema, options=pa.ipc.IpcWriteOptions(compression=packed, **how)) as file:
        file.write_table(rows)


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("packed", ["zstd", "lz4"])
def test_a_packed_arrow_batch_that_is_too_large_is_refused_before_it_is_unpacked(source, monkeypatch, form, packed):
    monkeypatch.setattr(readers, "TABLE_BYTES", 2**22)
    rows = table(["a" * 2**21] * 4)
    write_arrow(source / "x.arrow", rows, form, packed)
    monkeypatch.setattr(pa.ipc, "open_file", None)  # nothing may be unpacked
    monkeypatch.setattr(pa.ipc, "open_stream", None)
    said = refused(source, "x.arrow")
    assert "a record batch in it has 8,38" in said
    assert "fewer rows a batch" in said


def test_a_packed_arrow_file_of_small_batches_and_one_that_is_not_packed_are_read(source, monkeypatch):
    monkeypatch.setattr(readers, "TABLE_BYTES", 2**20)
    rows = table(["a" * 2**18] * 8)
    with pa.ipc.new_file(source / "x.arrow", rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(rows, max_chunksize=2)
    write_arrow(source / "y.arrow", rows)
    assert [file.valid for file in convert_alpaca(source, source.parent / "out.jsonl").files] == [1, 8, 8]


def test_the_dictionaries_of_a_packed_arrow_file_count_together(source, monkeypatch):
    monkeypatch.setattr(readers, "TABLE_BYTES", 2**20)
    names = ["instruction", "output"]
    texts = [pa.array(["a" * 2**19 + name]).dictionary_encode() for name in "xyz"]
    how = pa.ipc.IpcWriteOptions(compression="zstd", emit_dictionary_deltas=True)
    with pa.ipc.new_stream(source / "x.arrow", pa.table([texts[0]] * 2, names=names).schema, options=how) as file:
        for text in texts:
            file.write_table(pa.table([text] * 2, names=names))
    assert "a dictionary in it has 1,04" in refused(source, "x.arrow")


@given(
    st.lists(st.one_of(st.none(), st.text(max_size=200)), min_size=1, max_size=60),
    st.sampled_from(["file", "stream"]),
    st.sampled_from(["zstd", "lz4", None]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_what_arrow_messages_say_is_what_they_hold(outputs, form, packed, as_dictionary):
    column = pa.array(outputs, pa.string())
    rows = pa.table(
        {"instruction": ["q"] * len(column), "output": column.dictionary_encode() if as_dictionary else column}
    )
    file = pa.BufferOutputStream()
    write_arrow(file, rows, form, packed)
    data = file.getvalue()
    found = list(packed_sizes.messages(pa.BufferReader(data)))
    assert [each.type for each in found if each.type != "schema"] == ["dictionary"] * as_dictionary + ["record batch"]
    said = sum(map(packed_sizes.unpacked_bytes, found))
    texts = sum(len(text.encode()) for text in (set(outputs) if as_dictionary else outputs) if text)
    assert said >= texts + len(outputs) if packed else said == 0
    assert [row.value["output"] for row in readers.read_rows(io.BytesIO(data), "", Notes(), {}, None)] == outputs


@pytest.mark.parametrize("cut", [1, 7, 10, 40, 200])
@pytest.mark.parametrize("form", ["file", "stream"])
def test_a_packed_arrow_file_that_was_cut_costs_only_itself(source, form, cut):
    write_arrow(source / "x.arrow", table(["a" * 500] * 9), form, "zstd")
    data = (source / "x.arrow").read_bytes()
    (source / "x.arrow").write_bytes(data[:-cut])
    report = convert_alpaca(source, source.parent / "out.jsonl")
    assert report.files[0].valid == 1
    assert report.files[1].status in ("ok", "refused")


ONE, MANY = pa.array(["x" * 100]), 2_000


@pytest.mark.parametrize(
    "column",
    [
        pa.nulls(MANY),
        pa.RunEndEncodedArray.from_arrays(pa.array([MANY], pa.int32()), ONE),
        pa.DictionaryArray.from_arrays(pa.array([0] * MANY, pa.int8()), ONE),
    ],
    ids=["nulls", "runs", "dictionary"],
)
@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_small_table_of_endless_rows_ends(source, monkeypatch, column, form):
    monkeypatch.setattr(readers, "MOST_UNPACKED", 2**16)
    monkeypatch.setattr(readers, "LIKELY_RATIO", 2)
    rows = pa.table({"instruction": column, "output": column})
    if form == "arrow":
        write_arrow(source / "x.arrow", rows)
    elif pa.types.is_run_end_encoded(column.type):
        pytest.skip("parquet has no such type")
    else:
        pa.parquet.write_table(rows, source / "x.parquet")
    said = refused(source, f"x.{form}")
    assert "rows are over 65,536 bytes" in said


def lists_of_lists(depth):
    values = pa.array(["lol"] * 10)
    for _ in range(depth):
        values = pa.ListViewArray.from_arrays(pa.array([0] * 10, pa.int32()), pa.array([10] * 10, pa.int32()), values)
    return values.slice(0, 1)


def one_list(values):
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def views(text, count):
    one = pa.array([text], pa.string_view()).buffers()
    return pa.Array.from_buffers(
        pa.string_view(), count, [None, pa.py_buffer(one[1].to_pybytes()[:16] * count), *one[2:]]
    )


INDICES = pa.array([0] * 10_000, pa.int32())


@pytest.mark.parametrize(
    "history",
    [
        lists_of_lists(4),
        one_list(pa.DictionaryArray.from_arrays(INDICES, ONE)),
        one_list(pa.RunEndEncodedArray.from_arrays(pa.array([10_000], pa.int32()), ONE)),
        one_list(views("x" * 100, 10_000)),
    ],
    ids=["lists", "dictionary", "runs", "views"],
)
def test_a_value_that_lies_there_once_and_is_listed_a_million_times_costs_its_row(source, monkeypatch, history):
    monkeypatch.setattr(readers, "LONGEST_ROW", 5_000)
    rows = pa.table({"instruction": ["q"], "output": ["a"], "history": history})
    write_arrow(source / "x.arrow", rows)
    report = convert_alpaca(source, source.parent / "out.jsonl")
    assert dict(report.files[1].rejected) == {"broken": 1}
    assert "its history is longer than 5,000 bytes" in report.files[1].problems[0].detail


def test_a_history_of_views_or_of_words_from_a_dictionary_is_read(source):
    turns = [[["q", "a"], ["r", None]], None]
    for name, kind in {"x": pa.string_view(), "y": pa.dictionary(pa.int32(), pa.string())}.items():
        history = pa.array(turns, pa.list_(pa.list_(kind)))
        write_arrow(
            source / f"{name}.arrow", pa.table({"instruction": ["q", "r"], "output": ["a", "b"], "history": history})
        )
        rows = list(readers.read_rows(open(source / f"{name}.arrow", "rb"), "", Notes(), {}, None))  # noqa: SIM115
        assert [row.value["history"] for row in rows] == turns


LETTERS = {"lz4": b"\x04\x22\x4d\x18d@\xa7", "compress": b"\x1f\x9d\x90{", "snappy": b"\xff\x06\0\0sNaPpY"}


@pytest.mark.parametrize("name", [*LETTERS, "lzma"])
def test_what_is_packed_in_a_way_that_is_not_read_is_called_packed(source, name):
    data = lzma.compress(GOOD, format=lzma.FORMAT_ALONE) if name == "lzma" else LETTERS[name] + GOOD
    (source / "x.jsonl").write_bytes(data)
    assert f"it is packed ({name}): unpack it" in refused(source, "x.jsonl")
