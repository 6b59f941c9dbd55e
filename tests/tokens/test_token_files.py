"""Token files: never damaged, never beside the point, never longer than the model can read."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.tokens.encode import encode_example, encode_file, model_length, token_report
from tests.helpers.reference import tokenizer
from thuglm import ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[2]


def rows(count: int = 30) -> list[dict]:
    return [{"instruction": f"{number}+1=", "output": f"{number + 1}."} for number in range(count)]


@pytest.fixture
def file(tmp_path) -> Path:
    return convert_alpaca(rows(), tmp_path / "in" / "a.jsonl").output


def token_file(file: Path, **settings) -> Path:
    return Path(encode_file(file, tokenizer(), **settings).cache_files[0]["filename"])


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "cut": lambda content: content[:-40],
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": flip,
    "zeros": lambda content: content[:-300] + bytes(300),
    "longer": lambda content: content + b"x",
    "no tokens at all": lambda content: b"[]",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".arrow", ".json"])
def test_a_damaged_file_is_noticed_and_made_again(file, damage, suffix, capsys):
    first = encode_file(file, tokenizer())
    whole, ids, report = token_file(file), list(first["input_ids"]), token_report(first)
    good = {ending: whole.with_suffix(ending).read_bytes() for ending in (".arrow", ".json")}
    whole.with_suffix(suffix).write_bytes(DAMAGE[damage](good[suffix]))
    again = encode_file(file, tokenizer())
    assert "is damaged" in capsys.readouterr().out
    assert (list(again["input_ids"]), token_report(again)) == (ids, report)
    assert {ending: whole.with_suffix(ending).read_bytes() for ending in good} == good
    encode_file(file, tokenizer())
    assert not capsys.readouterr().out


def test_a_file_without_its_report_is_made_again(file):
    whole = token_file(file)
    whole.with_suffix(".json").unlink()
    assert token_report(encode_file(file, tokenizer())).kept == 30


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_beside_rows_that_nobody_may_write_to(file, tmp_path, monkeypatch, number, capsys):
    """Root may write everywhere, so the refusal of a read-only file system is played."""
    real = os.mkdir

    def mkdir(path, *args, **more):
        if Path(path).is_relative_to(file.parent):
            raise OSError(number, os.strerror(number), str(path))
        real(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setenv("GLM_OUTPUT", str(tmp_path / "out"))
    found = token_file(file)
    assert found.parent == tmp_path / "out" / "tokens"
    assert str(found.parent) in capsys.readouterr().out
    when = found.stat().st_mtime_ns
    assert token_file(file).stat().st_mtime_ns == when
    # A folder that was asked for by name is not replaced by another.
    with pytest.raises(OSError, match="wanted"):
        encode_file(file, tokenizer(), cache=file.parent / "wanted")


def test_the_users_home_is_found(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setenv("USERPROFILE", str(file.parent))
    assert token_file(Path("~/a.jsonl"), cache="~/other").parent == file.parent / "other"
    report = convert_alpaca("~/a.jsonl", "~/b.jsonl")
    assert report.output == file.parent / "b.jsonl"


def test_drafts_of_dead_processes_are_cleared(file):
    def child():
        real, token_folder = os.replace, file.parent / "tokens"

        def replace(old, new):
            if Path(new).parent == token_folder:
                os.kill(os.getpid(), signal.SIGKILL)
            real(old, new)

        os.replace = replace
        encode_file(file, tokenizer())

    killed(child)
    assert [path for path in (file.parent / "tokens").iterdir() if path.suffix == ".tmp"]
    # Other rows, so another name: what the dead one left is cleared all the same.
    convert_alpaca(rows(20), file)
    assert token_report(encode_file(file, tokenizer())).kept == 20
    assert {path.suffix for path in (file.parent / "tokens").iterdir()} == {".arrow", ".json"}


@pytest.mark.parametrize("moves", [0, 1, 2])
@pytest.mark.parametrize("inside", [False, True])
def test_a_conversion_that_was_killed_between_its_renames_is_finished(tmp_path, moves, inside):
    """`moves`: renames that the killed process still did; `inside`: the output lies in the folder of the source."""
    source = tmp_path / "s"
    source.mkdir()
    (source / "rows.json").write_text(json.dumps(rows(5)))
    output = (source if inside else tmp_path) / "train.jsonl"
    convert_alpaca(source, output)
    old = output.read_bytes()
    (source / "rows.json").write_text(json.dumps(rows(7)))

    def child():
        real, done = os.replace, []

        def replace(old, new):
            if len(done) == moves:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(new)
            real(old, new)

        os.replace = replace
        convert_alpaca(source, output)

    killed(child)
    assert len(encode_file(output, tokenizer())) == (7 if moves else 5)
    assert output.read_bytes() == old or moves
    report = convert_alpaca(source, output)
    assert report.rows_valid == 7
    left = {path.name for path in output.parent.iterdir()}
    assert left == {"train.jsonl", "train.report.json", "tokens"} | ({"rows.json"} if inside else {"s"})


def killed(work) -> None:
    """Run `work` in a copy of this process, which must end by SIGKILL."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


LONG = {"instruction": "讲故事", "output": "很久以前有一座山。" * 400}


def test_rows_beyond_the_models_length_are_left_out_and_counted(tmp_path):
    convert_alpaca([*rows(), LONG], tmp_path / "a.jsonl")
    made = encode_file(tmp_path / "a.jsonl", tokenizer())
    report = token_report(made)
    assert (report.examples, report.kept, report.dropped) == (31, 30, {"longer than the model's 2048 tokens": 1})
    assert max(report.lengths) > 2048 >= max(made["length"])
    # A limit of the user's counts if it is lower, and cutting is done at the model's length.
    assert max(encode_file(tmp_path / "a.jsonl", tokenizer(), too_long="cut")["length"]) == 2048
    dropped = token_report(encode_file(tmp_path / "a.jsonl", tokenizer(), max_length=99)).dropped
    assert dropped == {"longer than 99 tokens": 1}
    assert token_report(encode_file(tmp_path / "a.jsonl", tokenizer(), max_length=9999)).dropped == report.dropped
    with pytest.raises(ValueError, match="the model's 2048 tokens"):
        encode_example(tokenizer(), LONG)


@pytest.mark.parametrize(
    ("config", "length"),
    [({"max_sequence_length": 64}, 64), ({}, 2048), ({"max_sequence_length": "many"}, 2048), ([], 2048), (None, 2048)],
)
def test_the_length_is_that_of_the_checkpoint(tmp_path, config, length):
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(ROOT / "data" / "tiny-chatglm" / name, tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_length(ChatGLMTokenizer.from_pretrained(tmp_path)) == length
