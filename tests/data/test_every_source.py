"""Whatever lies in a folder: what can be read is, the rest is named; nothing hangs, and nothing stops the others."""

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import zipfile

import datasets
import pandas as pd
import pytest

from glmhelpers.data import convert, json_recovery
from glmhelpers.data.convert import convert_alpaca
from tests.helpers.alpaca_rows import array, check, row

pytestmark = pytest.mark.timeout(120)  # a call that hangs is ended

LINES = "".join(json.dumps(row(number), ensure_ascii=False) + "\n" for number in range(3))


@pytest.fixture
def folder(tmp_path):
    """With one good file of one row."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "good.json").write_text(array([row(9)]))
    return tmp_path / "s"


def read(folder, **options):
    output = folder.parent / "out.jsonl"
    report = convert_alpaca(folder, output, **options)
    check(report, output)
    return {report.name_of(file): file for file in report.files}, report


LINKS = {"itself": "odd.json", "nothing": "gone.json", "a circle": "odder.json", "a device": "/dev/zero"}


@pytest.mark.parametrize("where", LINKS)
def test_links_that_lead_nowhere(folder, where):
    os.symlink(LINKS[where], folder / "odd.json")
    if where == "a circle":
        os.symlink("odd.json", folder / "odder.json")
    files, report = read(folder)
    assert (files["odd.json"].status, report.rows_valid) == ("refused", 1)
    with pytest.raises((FileNotFoundError, ValueError), match=r"odd\.json"):
        convert_alpaca(folder / "odd.json", folder.parent / "out.jsonl")


def test_folders_that_lead_round(folder):
    os.symlink("..", folder / "up")
    _, report = read(folder)
    assert (report.rows_valid, report.left_alone) == (1, ["up"])


@pytest.mark.parametrize("kind", ["a named pipe", "a socket"])
def test_what_is_no_file_is_named_and_not_opened(folder, kind, monkeypatch):
    monkeypatch.chdir(folder)  # the path of a socket must be short
    if kind == "a socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("odd.jsonl")
    else:
        os.mkfifo("odd.jsonl")
    files, report = read(folder)
    assert (files["odd.jsonl"].status, kind in files["odd.jsonl"].message, report.rows_valid) == ("refused", True, 1)
    with pytest.raises(ValueError, match=kind):
        convert_alpaca(folder / "odd.jsonl", folder.parent / "out.jsonl")


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    (folder / "shut").mkdir()
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    files, report = read(folder)
    assert (files["shut"].status, "Permission denied" in files["shut"].message) == ("refused", True)
    assert report.rows_valid == 1


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_damaged_member_costs_only_itself(tmp_path, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("bad.jsonl", LINES * 200)
        archive.writestr("good.jsonl", LINES)
    place = zipfile.ZipFile(path).infolist()[0].header_offset + 30 + len("bad.jsonl") + 40
    content = bytearray(path.read_bytes())
    content[place : place + 30] = bytes(range(30))
    path.write_bytes(content)
    files, report = read(path)
    assert (files["bad.jsonl"].status, files["bad.jsonl"].valid) == ("refused", 0)
    assert (files["good.jsonl"].status, report.rows_valid) == ("ok", 3)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("the parser gave up"), KeyError("x"), lzma.LZMAError("y")]
)
def test_whatever_a_reader_raises_costs_only_its_file(folder, error, monkeypatch):
    (folder / "big.json").write_text(array([row(1)]))
    real = convert.read_rows

    def read_rows(file, name, *others):
        for found in real(file, name, *others):
            yield found
            if name == "big.json":
                raise error

    monkeypatch.setattr(convert, "read_rows", read_rows)
    files, report = read(folder)
    assert (files["big.json"].status, files["big.json"].valid, report.rows_valid) == ("refused", 0, 1)
    assert (str(error) or "MemoryError") in files["big.json"].message


def test_an_error_of_writing_is_none_of_a_file(folder, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "_line", no_space)
    with pytest.raises(OSError, match="No space left"):
        read(folder)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_packed_files_are_unpacked_on_the_way(folder, ending, name):
    table = "instruction,output\n" + "".join(f"q{number},a\n" for number in range(3))
    text = {"t.jsonl": LINES, "t.json": array([row(1), row(2), row(3)]), "t.csv": table}[name]
    (folder / f"{name}{ending}").write_bytes(PACK[ending](text.encode()))
    files, _ = read(folder)
    assert (files[name + ending].status, files[name + ending].valid) == ("ok", 3)
    # Under a name that does not tell, in a zip, and alone.
    (folder / f"{name}{ending}").rename(folder / name)
    assert read(folder)[0][name].valid == 3
    with zipfile.ZipFile(folder.parent / "a.zip", "w") as archive:
        archive.write(folder / name, name + ending)
    assert read(folder.parent / "a.zip")[1].rows_valid == 3
    assert read(folder / name)[1].rows_valid == 3


def test_a_packed_file_beside_the_same_unpacked_is_left_alone(folder):
    (folder / "t.jsonl").write_text(LINES)
    (folder / "t.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    _, report = read(folder)
    assert (report.rows_valid, report.left_alone) == (4, ["t.jsonl.gz"])


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("t.jsonl")
        member.size = len(LINES.encode())
        archive.addfile(member, io.BytesIO(LINES.encode()))
    return file.getvalue()


BAD_PACKS = {
    "cut": (gzip.compress(LINES.encode() * 50)[:-20], "ended before"),
    "twice": (gzip.compress(gzip.compress(LINES.encode())), "packed twice"),
    "tar": (tar(), "packed (tar)"),
    "tar.gz": (gzip.compress(tar()), "packed (tar)"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "packed (zstd)"),
}


@pytest.mark.parametrize("name", BAD_PACKS)
def test_what_cannot_be_unpacked_is_named(folder, name):
    content, words = BAD_PACKS[name]
    (folder / "t.json").write_bytes(content)
    files, report = read(folder)
    assert (files["t.json"].status, report.rows_valid) == ("refused", 1)
    assert words in files["t.json"].message


HISTORY = [row(1, history=[["q", "a"]]), row(2, history=[])]


def test_a_saved_data_set_is_read(tmp_path):
    data = datasets.Dataset.from_list(HISTORY)
    data.save_to_disk(tmp_path / "s")
    data.map(lambda each: {"output": "changed"}, cache_file_name=str(tmp_path / "s" / "cache-1.arrow"))
    files, report = read(tmp_path / "s")
    assert list(files) == ["data-00000-of-00001.arrow"]
    assert report.left_alone == ["cache-1.arrow", "dataset_info.json", "state.json"]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").open()] == [HISTORY[0], row(2)]
    (tmp_path / "cut").mkdir()
    whole = next((tmp_path / "s").glob("data*.arrow")).read_bytes()
    (tmp_path / "cut" / "a.arrow").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut" / "b.json").write_text(array([row(9)]))
    assert read(tmp_path / "cut")[0]["a.arrow"].status == "refused"


def test_feather_is_read(tmp_path):
    pd.DataFrame([row(1), row(2)]).to_feather(tmp_path / "a.arrow", compression="uncompressed")
    assert read(tmp_path / "a.arrow")[1].rows_valid == 2


def test_parts_of_a_data_set_are_named_and_can_be_chosen(tmp_path):
    parts = {"train": [row(1), row(2)], "test": [row(3)], "validation": [row(4)]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    with pytest.raises(TypeError, match=r"source\['train'\]"):
        convert_alpaca(made, tmp_path / "out.jsonl")
    assert convert_alpaca(made["train"], tmp_path / "out.jsonl").rows_valid == 2
    made.save_to_disk(tmp_path / "saved")
    # As the hub's cache keeps a snapshot: links to files with other names.
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    (tmp_path / "hub" / "snapshots" / "0a1b").mkdir(parents=True)
    for number, (name, rows) in enumerate(parts.items()):
        pd.DataFrame(rows).to_parquet(tmp_path / "hub" / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", tmp_path / "hub" / "snapshots" / "0a1b" / f"{name}-00000-of-00001.parquet")
    for folder in (tmp_path / "saved", tmp_path / "hub", tmp_path / "hub" / "snapshots" / "0a1b"):
        _, report = read(folder)
        assert (report.rows_valid, report.parts) == (4, ["test", "train", "validation"])
        assert "part='train'" in str(report)
        for name, rows in parts.items():
            _, report = read(folder, part=name)
            assert report.rows_valid == len(rows)
            assert name not in report.parts
        with pytest.raises(ValueError, match=r"no part 'dev'; .* test, train, validation"):
            read(folder, part="dev")


def test_names_that_only_begin_like_a_part_are_none(folder):
    (folder / "testimony.json").write_text(array([row(1)]))
    (folder / "training-notes").mkdir()
    _, report = read(folder)
    assert (report.rows_valid, report.parts) == (2, [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_line_without_end_is_broken_and_the_next_is_read(tmp_path, name, monkeypatch):
    for limit in ("readers.LONGEST_ROW", "json_recovery.LONGEST_ROW", "csv_reader.LONGEST_LINE"):
        monkeypatch.setattr(f"glmhelpers.data.{limit}", 2**12)
    monkeypatch.setattr(json_recovery, "WINDOW", 2**10)
    monkeypatch.setattr(json_recovery._Window.fill, "__defaults__", (2**10,))
    good, long = [row(1), row(2)], row(3, output="长" * 2**15)
    if name == "a.csv":
        lines = ["instruction,input,output", *(",".join(each.values()) for each in (good[0], long, good[1]))]
        text = "\n".join(lines)
    else:
        texts = [json.dumps(each, ensure_ascii=False) for each in (good[0], long, good[1])]
        text = "\n".join(texts) if name == "a.jsonl" else "[" + ",\n".join(texts) + "]"
    (tmp_path / name).write_text(text, encoding="utf-8")
    _, report = read(tmp_path / name)
    assert (report.rows, report.rejected) == (3, {"broken": 1})
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").open()] == good
