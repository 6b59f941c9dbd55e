"""An empty path is not the folder one happens to be in, and what no file can be called is named: at every door."""

import pytest

from glmhelpers.data.convert import convert_alpaca
from glmhelpers.tokens.encode import encode_file
from glmhelpers.weights.convert import convert_to_safetensors
from glmhelpers.weights.download import download_weights
from glmhelpers.weights.loading import load_model
from glmhelpers.weights.verify import verify_weights
from tests.helpers.reference import tokenizer

ROW = {"instruction": "q", "output": "a"}
DOORS = {
    "convert_alpaca, source": lambda path: convert_alpaca(path, "out.jsonl"),
    "convert_alpaca, output": lambda path: convert_alpaca([ROW], path),
    "encode_file": lambda path: encode_file(path, tokenizer()),
    "load_model": load_model,
    "verify_weights": verify_weights,
    "download_weights": lambda path: download_weights(path, progress=False),
    "convert_to_safetensors": convert_to_safetensors,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("path", "message"),
    [("", "the path is empty"), ("a\0b", r"'a\\x00b' is no path"), ("\ud800", r"'\\ud800' is no path")],
)
def test_a_path_that_is_none_is_named_and_nothing_is_written(tmp_path, monkeypatch, door, path, message):
    (tmp_path / "rows.json").write_text('{"instruction": "q", "output": "a"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        DOORS[door](path)
    assert [each.name for each in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("path", [None, 5, b"rows.json"])
def test_what_is_no_path_is_named(tmp_path, monkeypatch, door, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=rf" is a {type(path).__name__}"):
        DOORS[door](path)
