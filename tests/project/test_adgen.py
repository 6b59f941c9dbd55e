"""The advertisement data: rows cut by the published recipe, and the whole road from the files to the scores."""

import json

import pytest

from glmhelpers import adgen, runtime
from glmhelpers.inference.scores import score_texts
from glmhelpers.tokens.encode import encode_file
from tests.helpers.reference import tokenizer

AD = "宽松的阔腿裤这两年真的吸粉不少，明星时尚达人的心头爱。毕竟好穿时尚，谁都能穿出腿长2米的效果。"


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def advert(number, times=1):
    return {"content": f"类型#裤*版型#宽松*裤长#{number}", "summary": AD * times}


def test_rows_are_renamed_cut_and_none_is_lost(tmp_path):
    source = write(tmp_path / "dev.json", [advert(1), advert(2, 9), {"content": "裤" * 99, "summary": "好"}])
    prepared = adgen.prepare(source, tmp_path / "out.jsonl", tokenizer())
    rows = prepared.rows
    assert len(rows) == prepared.report.rows_valid == 3
    assert rows[0]["instruction"] == "类型#裤*版型#宽松*裤长#1"
    assert (AD * 9).startswith(rows[1]["output"])
    for row in rows:
        for side in ("instruction", "output"):
            assert len(tokenizer().encode(row[side], add_special_tokens=False)) <= adgen.MOST_TOKENS
    assert prepared.cut == sum(
        any(len(tokenizer().encode(text, add_special_tokens=False)) > adgen.MOST_TOKENS for text in row.values())
        for row in map(json.loads, source.read_text(encoding="utf-8").splitlines())
    )
    assert str(prepared).startswith("3 rows, ")
    whole = [json.loads(line) for line in (tmp_path / "out.whole.jsonl").read_text(encoding="utf-8").splitlines()]
    assert whole[1]["output"] == AD * 9


def test_a_reference_is_written_as_the_model_would_write_it(tmp_path):
    """Full-width letters and digits: the tokenizer knows them as ASCII, so an answer can only be that."""
    text, shortened = adgen.cut_text("Ｔ恤，２０２３新款", tokenizer())
    assert (text, shortened) == ("T恤，2023新款", False)


def test_half_a_character_is_cut_off():
    text, shortened = adgen.cut_text("👋" * 9, tokenizer(), most=7)
    assert shortened
    assert text == "👋"


def test_rows_that_are_no_adverts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dev\.json"):
        adgen.prepare(write(tmp_path / "dev.json", [{"a": 1}]), tmp_path / "out.jsonl", tokenizer())
    with pytest.raises(FileNotFoundError):
        adgen.prepare(tmp_path / "train.json", tmp_path / "out.jsonl", tokenizer())


def test_settings_are_those_of_the_table():
    assert adgen.TRAINING["max_steps"] * adgen.TRAINING["per_device_train_batch_size"] == 48_000
    assert (adgen.PUBLISHED["bleu4"], adgen.PUBLISHED["rougel"]) == (7.62, 24.80)
    assert adgen.GENERATION["do_sample"]


def test_from_the_files_to_the_scores(tmp_path, monkeypatch, capsys):
    """The rehearsal of appendix E: the tiny model with 2 steps; a second call reads the finished training back."""
    monkeypatch.setattr(runtime, "output_folder", lambda *_: tmp_path / "out")
    run = runtime.choose("tiny", "cpu")
    write(tmp_path / "train.json", [advert(n) for n in range(12)])
    write(tmp_path / "dev.json", [advert(n) for n in range(20, 23)])
    small = {"max_steps": 2, "per_device_train_batch_size": 4}
    scores, texts = adgen.repeat(run, tmp_path, **small)
    assert (scores.answers, len(texts)) == (3, 3)
    assert "train: 12 rows" in capsys.readouterr().out
    assert (run.output / "adgen" / "adapter_model.safetensors").is_file()
    assert adgen.repeat(run, tmp_path, **small) == (scores, texts)
    assert len(encode_file(run.output / "adgen_train.jsonl", tokenizer())) == 12
    references = [
        json.loads(line)["output"] for line in (run.output / "adgen_dev.jsonl").read_text("utf-8").splitlines()
    ]
    assert scores == score_texts(texts, references)
