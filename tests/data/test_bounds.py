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
            header, length = readers._page_header(file.read(2**16))
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
        readers._page_header(data)


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
