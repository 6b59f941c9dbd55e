"""Rows to tokens: against the golden data of the original tokenizer, and by counting."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import thuglm.prompt
from glmhelpers.tokens import encode as tokens
from glmhelpers.tokens import examples
from glmhelpers.tokens import prompts as templates
from glmhelpers.tokens.encode import (
    Settings,
    cache_key,
    encode_example,
    encode_file,
    split_by_prompt,
    text_ids,
    token_report,
)
from glmhelpers.tokens.examples import split_key
from glmhelpers.tokens.prompts import build_prompt
from tests.helpers.reference import generation_cases, logit_cases, tensors, tokenizer, tokenizer_cases
from thuglm.chunked_loss import IGNORE_INDEX

GMASK, SOP, EOP, MASK, PAD = 2657, 2660, 2661, 2656, 3


def row(question: str, answer: str, **more) -> dict:
    return {"instruction": question, "input": "", "output": answer, **more}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), "utf-8")
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    rows = [row(f"问题 {i}", "答案" * (i % 40 + 1)) for i in range(1, 1200)]
    return write(tmp_path / "train.jsonl", rows)


# ---- one example ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [p for p in tokenizer_cases()["pairs"] if p["a"] and "<" not in p["b"] + p["a"]][:6])
def test_against_original_tokenizer(pair):
    if "[MASK]" in pair["a"]:
        pytest.skip("holds a special token, refused on purpose")
    ids = encode_example(tokenizer(), row(pair["a"], pair["b"]))["input_ids"]
    assert ids == pair["encode"]


@pytest.mark.parametrize("case", generation_cases()["chat_prompts"])
def test_against_original_chat_prompts(case):
    example = encode_example(tokenizer(), row(case["query"], "x", history=case["history"]))
    assert example["input_ids"][: len(case["input_ids"])] == case["input_ids"]


@pytest.mark.parametrize(("train_sop", "name"), [(True, "b_train"), (False, "b2_train_answer_only")])
def test_against_original_training_example(train_sop, name):
    """The labels with which the original model gave its golden loss, in both treatments of <sop>."""
    question, answer = logit_cases()["b_train"]["text"]
    example = encode_example(tokenizer(), row(question, answer), train_sop=train_sop)
    golden = tensors(name)
    assert example == {column: golden[column][0].tolist() for column in ("input_ids", "labels")}


def test_labels_are_the_answer_and_its_end():
    example = encode_example(tokenizer(), row("What is 2+2?", "It is 4."))
    golden = [492, 28, 229, 355, 108, 34, GMASK, SOP, 240, 28, 5, 255, EOP]
    assert example == {"input_ids": golden, "labels": [IGNORE_INDEX] * 8 + golden[8:]}


def test_sop_is_a_target_only_if_asked_for():
    plain = encode_example(tokenizer(), row("a", "b"))
    original = encode_example(tokenizer(), row("a", "b"), train_sop=True)
    place = plain["input_ids"].index(SOP)
    assert plain["labels"][place] == IGNORE_INDEX
    assert original["labels"][place] == SOP
    assert original["labels"][:place] == plain["labels"][:place] == [IGNORE_INDEX] * place
    assert original["labels"][place + 1 :] == plain["labels"][place + 1 :]


def test_system_input_and_template_reach_the_tokens():
    tok = tokenizer()
    example = encode_example(tok, row("Sort these", "a b", input="b a", system="Be brief."), template="alpaca")
    prompt = "Be brief.\nInstruction: Sort these\nInput: b a\nAnswer: "
    assert example["input_ids"] == tok.encode(prompt, "a b")


@pytest.mark.parametrize("text", ["a <sop> b", "[MASK]", "x <eop>", "<pad>"])
def test_special_tokens_in_a_text_are_refused(text):
    for question, answer in ((text, "b"), ("a", text + "c")):
        with pytest.raises(ValueError, match="special token in the text"):
            encode_example(tokenizer(), row(question, answer))


def test_gmask_in_a_text_is_spelled_out():
    ids = encode_example(tokenizer(), row("what is [gMASK]?", "a hole"))["input_ids"]
    assert ids.count(GMASK) == 1


def test_too_long():
    tok, long = tokenizer(), row("问题", "很长的答案" * 20)
    whole = encode_example(tok, long)["input_ids"]
    with pytest.raises(ValueError, match="longer than 20 tokens"):
        encode_example(tok, long, max_length=20)
    cut = encode_example(tok, long, max_length=20, too_long="cut")
    assert cut["input_ids"] == [*whole[:19], EOP]
    assert cut["labels"][-1] == EOP
    assert encode_example(tok, long, max_length=len(whole))["input_ids"] == whole
    with pytest.raises(ValueError, match="longer than"):
        encode_example(tok, long, max_length=len(whole) - 1)
    with pytest.raises(ValueError, match="prompt alone fills 5 tokens"):
        encode_example(tok, row("这是一个很长的问题", "b"), max_length=5, too_long="cut")


@pytest.mark.parametrize("wrong", [{"template": "gpt"}, {"too_long": "keep"}, {"answers": "first"}, {"max_length": 4}])
def test_wrong_settings_name_the_setting(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


# ---- the fast way ---------------------------------------------------------------------------------------------------


def test_text_ids_equal_the_golden_ids():
    cases = [case for case in tokenizer_cases()["texts"] if "error" not in case["encode_no_special"]]
    assert text_ids(tokenizer(), [case["text"] for case in cases]) == [case["encode_no_special"] for case in cases]


SPECIAL = st.sampled_from(["<sop>", "<eop>", "[MASK]", "[gMASK]", "<pad>", "<n>", "  ", "\n", "\t", " <", "[", "\r"])


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(SPECIAL | st.text(max_size=8), max_size=5).map("".join), max_size=5))
def test_text_ids_equal_the_tokenizer_one_by_one(texts):
    tok = tokenizer()
    assert text_ids(tok, texts) == [tok.encode(text, add_special_tokens=False) for text in texts]


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_gives_what_its_rows_give(file, monkeypatch):
    monkeypatch.setattr(examples, "CHUNK", 512)
    tok = tokenizer()
    dataset = encode_file(file, tok)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert len(dataset) == len(rows) > 2 * examples.CHUNK
    for place in (0, 1, 39, examples.CHUNK - 1, examples.CHUNK, len(rows) - 1):
        example = encode_example(tok, rows[place])
        assert {name: dataset[place][name] for name in example} == example
        assert dataset[place]["length"] == len(example["input_ids"])
    report = token_report(dataset)
    ids = [tok.encode(each["instruction"], each["output"]) for each in rows]
    assert report.tokens == sum(map(len, ids))
    assert report.targets == sum(len(each) - each.index(SOP) - 1 for each in ids)
    assert report.lengths.total() == report.kept == report.examples == report.rows == len(rows)
    assert report.settings["template"] == "chatglm"


def test_every_row_has_one_hole_then_one_start(file):
    ids = encode_file(file, tokenizer())["input_ids"]
    for each in ids:
        assert (each.count(GMASK), each.count(SOP), each.count(EOP), each.count(MASK)) == (1, 1, 1, 0)
        assert each[each.index(GMASK) + 1] == SOP
        assert each[-1] == EOP


def test_dropped_and_cut_are_counted(tmp_path):
    rows = [row("a", "b"), row("a", "b " * 50), row("a" * 90, "b"), row("a", "<sop>"), row("a", "<eop> b")]
    path = write(tmp_path / "a.jsonl", rows)
    dropped = token_report(encode_file(path, tokenizer(), max_length=30))
    assert dropped.dropped == {"longer than 30 tokens": 2, "special token in the text": 2}
    assert (dropped.rows, dropped.kept, dropped.cut) == (5, 1, 0)
    cut = token_report(encode_file(path, tokenizer(), max_length=30, too_long="cut"))
    assert cut.dropped == {"prompt alone fills 30 tokens": 1, "special token in the text": 2}
    assert (cut.kept, cut.cut) == (2, 1)
    # The report keeps the lengths before any limit, so that limits can be compared.
    assert cut.lengths == dropped.lengths
    assert max(cut.lengths) > 30
    assert "special token" in str(cut)


def test_all_answers_of_a_conversation(tmp_path):
    history = [["你好", "你好！"], ["再见", "再见！"]]
    path = write(tmp_path / "a.jsonl", [row("谢谢", "不客气", history=history, system="Be kind."), row("a", "b")])
    last, every = (encode_file(path, tokenizer(), answers=which) for which in ("last", "all"))
    assert (len(last), len(every)) == (2, 4)
    decoded = [tokenizer().decode([i for i in each if i != IGNORE_INDEX]) for each in every["labels"]]
    assert decoded == ["你好!", "再见!", "不客气", "b"]
    for turn, prompt in enumerate([("你好", []), ("再见", history[:1]), ("谢谢", history)]):
        text = build_prompt(*prompt, system="Be kind.")
        assert every["input_ids"][turn][: len(tokenizer().encode(text))] == tokenizer().encode(text)
    # One conversation is never on both sides of a split.
    assert len(set(every["split_key"][:3])) == 1


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for line, word in (
        ("{", "line 2"),
        ('{"instruction": "a"}', "output"),
        ('{"instruction": "a", "output": " "}', "empty"),
        ('{"instruction": "a", "output": "b", "history": [["only one"]]}', "turn 0"),
        ('{"instruction": "你", "output": "好"}', "can't decode byte"),
    ):
        path.write_bytes((json.dumps(row("a", "b")) + "\n" + line + "\n").encode("gb18030"))
        with pytest.raises(ValueError, match=word) as caught:
            encode_file(path, tokenizer())
        assert f"{path}, line 2" in str(caught.value)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_nothing_left_is_an_error_and_leaves_no_file(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("a", "<sop>")])
    with pytest.raises(ValueError, match="special token"):
        encode_file(path, tokenizer())
    assert list((tmp_path / "tokens").iterdir()) == []


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_the_second_call_reads_the_file(file, monkeypatch):
    first = encode_file(file, tokenizer())

    def never(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(tokens, "_write", never)
    assert encode_file(file, tokenizer())["input_ids"] == first["input_ids"]


def test_another_folder_for_the_cache(file, tmp_path):
    encode_file(file, tokenizer(), cache=tmp_path / "elsewhere")
    assert sorted(path.suffix for path in (tmp_path / "elsewhere").iterdir()) == [".arrow", ".json"]
    assert not (file.parent / "tokens").exists()


def test_the_key_follows_everything_the_tokens_depend_on(file, tmp_path, monkeypatch):
    tok = tokenizer()
    keys = [cache_key(file, tok, Settings())]
    keys += [
        cache_key(file, tok, Settings(**change))
        for change in (
            {"template": "alpaca"},
            {"max_length": 9},
            {"max_length": 9, "too_long": "cut"},
            {"answers": "all"},
            {"train_sop": True},
        )
    ]
    with monkeypatch.context() as patch:
        patch.setattr(type(tok), "encode_whitespace", staticmethod(lambda text: text))
        keys.append(cache_key(file, tok, Settings()))
    changed = tmp_path / "templates.py"
    changed.write_text(Path(templates.__file__).read_text("utf-8") + "# changed", "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(templates, "__file__", str(changed))
        keys.append(cache_key(file, tok, Settings()))
    # The published chat prompt, on which the template "chatglm" is built.
    changed = tmp_path / "prompt.py"
    changed.write_text(Path(thuglm.prompt.__file__).read_text("utf-8").replace("[Round", "[Turn"), "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(thuglm.prompt, "__file__", str(changed))
        keys.append(cache_key(file, tok, Settings()))
    text = file.read_text("utf-8")
    file.write_text(text.replace("问题 7", "问题 8", 1), "utf-8")
    keys.append(cache_key(file, tok, Settings()))
    assert len(set(keys)) == len(keys) == 10
    file.write_text(text, "utf-8")
    assert cache_key(file, tok, Settings()) == keys[0]


def test_a_tokenizer_with_another_vocabulary_gets_other_tokens(file, tmp_path):
    class Shifted:
        """The same interface, other ids, no SentencePiece model to look at."""

        pad_token_id = 3

        def encode(self, text, pair=None, add_special_tokens=True):
            ids = [10 + byte for byte in text.encode()]
            if not add_special_tokens:
                return ids
            return self.build_inputs_with_special_tokens(ids, None if pair is None else [10 + b for b in pair.encode()])

        def build_inputs_with_special_tokens(self, prompt, answer=None):
            return [*prompt, 0, 1] + ([] if answer is None else [*answer, 2])

        def convert_tokens_to_ids(self, token):
            return 4

    assert cache_key(file, Shifted(), Settings()) != cache_key(file, tokenizer(), Settings())
    ids = encode_file(file, Shifted())[0]["input_ids"]
    assert ids == [10 + b for b in "问题 1".encode()] + [0, 1] + [10 + b for b in "答案答案".encode()] + [2]


# ---- the split ------------------------------------------------------------------------------------------------------


def test_split_keeps_equal_questions_together(tmp_path):
    rows = [row(f"Question {i % 300}", f"answer {i}") for i in range(900)]
    dataset = encode_file(write(tmp_path / "a.jsonl", rows), tokenizer())
    train, held = split_by_prompt(dataset, share=0.2)
    assert len(train) + len(held) == 900
    assert not set(train["split_key"]) & set(held["split_key"])
    # 300 questions, each held out with a chance of 0.2: 60 +- 7, so 30 to 90 is more than four deviations.
    assert 3 * 30 < len(held) < 3 * 90


def test_split_does_not_depend_on_order_or_machine(tmp_path):
    rows = [row(f"Question {i}", "a") for i in range(200)]
    names = []
    for order in (rows, rows[::-1]):
        dataset = encode_file(write(tmp_path / "a.jsonl", order), tokenizer())
        names.append({tuple(ids) for ids in split_by_prompt(dataset, 0.3)[1]["input_ids"]})
    assert names[0] == names[1]
    # A number that any machine must get: `printf 你好 | b2sum -l 64`, over 2**64.
    assert split_key(row("你好", "x")) == pytest.approx(0.33246388802813276)


def test_split_seed_and_share(file):
    dataset = encode_file(file, tokenizer())
    held = [set(split_by_prompt(dataset, 0.1, seed)[1]["split_key"]) for seed in (0, 1)]
    assert held[0] != held[1]
    assert len(split_by_prompt(dataset, 0.0)[1]) == 0
    assert len(split_by_prompt(dataset, 1.0)[0]) == 0
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        split_by_prompt(dataset, 1.5)


def test_split_key_ignores_case_width_and_spaces_and_follows_the_first_question():
    assert split_key(row("Ｗｈａｔ  is it ", "a")) == split_key(row("what is it", "b"))
    assert split_key(row("x", "a", history=[["what is it", "y"]])) == split_key(row("what is it", "b"))
    assert split_key(row("a", "c", input="b")) != split_key(row("a", "c"))
    keys = np.array([split_key(row(f"q{i}", "a")) for i in range(4000)])
    assert abs(keys.mean() - 0.5) < 0.02
