"""The conversation: what reaches the model, what comes back, and everything a person may type."""

import itertools
import re
import threading
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from glmhelpers.inference.batch import answers, compare
from glmhelpers.inference.chat import ChatSession, Generation, plain_text, settled
from glmhelpers.runtime import find_project
from tests.helpers.reference import CHECKPOINT, adapted_model, fresh_model, generation_cases, model, tokenizer
from thuglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from thuglm.prompt import process_response

GREEDY = Generation(max_new_tokens=12, temperature=0)
TINY = find_project() / "data" / "tiny-chatglm"
SOP, GMASK, EOP = 2660, 2657, 2661


def session(net=None, **settings):
    return ChatSession(
        net or model(), tokenizer(), settings=Generation(**{"temperature": 0, "max_new_tokens": 12, **settings})
    )


def tokens_of(ids):
    yield from ([token] for token in ids)


@pytest.fixture(scope="module")
def tiny():
    net = ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    return net, ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def adapted():
    return adapted_model()


# Answers


@pytest.mark.parametrize("case", generation_cases()["chat_prompts"], ids=lambda case: f"{len(case['history'])} turns")
def test_against_original_chat(case):
    chat = session(max_new_tokens=case["greedy_max_new_tokens"])
    chat.history = [tuple(turn) for turn in case["history"]]
    answer = chat.chat(case["query"])
    assert answer.text == case["response"]
    assert [list(turn) for turn in chat.history] == case["new_history"]
    assert answer.prompt_tokens == len(case["input_ids"])


def test_streaming_gives_the_steps_of_one_answer():
    steps = list(session(max_new_tokens=9).stream("你好"))
    assert [step.new_tokens for step in steps] == list(range(1, 10))
    assert [step.ended for step in steps] == [""] * 8 + ["length"]
    assert steps[-1].text == session(max_new_tokens=9).chat("你好").text
    assert all(a.seconds <= b.seconds and a.first_seconds == b.first_seconds for a, b in itertools.pairwise(steps))
    assert steps[-1].first_seconds == steps[0].seconds > 0


def test_turns_remember_each_other(tiny):
    chat = ChatSession(*tiny, settings=Generation(temperature=0))
    texts = [chat.chat(question).text for question in ("你好", "3加4等于几？", "What is the capital of France?")]
    assert "你好" in texts[0]
    assert "3+4=7" in texts[1]
    assert "Paris" in texts[2]
    assert len(chat.history) == 3
    long = chat.chat("再见").prompt_tokens
    chat.clear()
    assert chat.history == []
    assert chat.chat("再见").prompt_tokens < long


def test_figures_are_tokens_over_seconds(tiny):
    answer = ChatSession(*tiny, settings=Generation(temperature=0)).chat("你好")
    assert answer.ended == "eop"
    assert answer.tokens_per_s == pytest.approx((answer.new_tokens - 1) / (answer.seconds - answer.first_seconds))
    assert f"{answer.prompt_tokens} tokens read, {answer.new_tokens} written" in answer.figures
    assert f"{answer.tokens_per_s:.1f} tokens/s" in answer.figures


def test_say_prints_the_answer_once_whole_and_its_figures(tiny, capsys):
    chat = ChatSession(*tiny, settings=Generation(temperature=0))
    for question in ("你好", "What is your name?", "请列出三种颜色。"):
        answer = chat.say(question)
        assert capsys.readouterr().out == f"{answer.text}\n[{answer.figures}]\n"


def test_say_repairs_what_later_tokens_change(monkeypatch, capsys):
    texts = iter(["ab", "ab,", "ab，中", "XY，中"])
    monkeypatch.setattr("glmhelpers.inference.chat.process_response", lambda text: next(texts))
    answer = session(max_new_tokens=4).say("你好")
    assert answer.text == "XY，中"
    assert capsys.readouterr().out.startswith("ab，中\nXY，中\n[")


@given(st.text("你好a,!:;? \n", max_size=12), st.text("你好a,!:;? \n", max_size=3))
def test_settled_text_never_changes(text, more):
    assert process_response(text + more).startswith(settled(process_response(text)))


def test_empty_answers_are_answers(monkeypatch, capsys):
    first = session().decoder.generate(tokenizer()(["你好"], return_tensors="pt")["input_ids"], max_new_tokens=1)[0][0]
    net = fresh_model()
    net.config.eos_token_id = first
    words = ChatGLMTokenizer.from_pretrained(CHECKPOINT.parent / "tokenizer")
    monkeypatch.setattr(type(words), "eos_token_id", first, raising=False)
    answer = ChatSession(net, words, settings=GREEDY).say("你好")
    assert (answer.text, answer.ended, answer.new_tokens) == ("", "eop", 1)
    assert "[empty answer: 5 tokens read, 1 written" in capsys.readouterr().out


# Settings


def test_seed_repeats_and_no_seed_varies():
    wild = {"temperature": 2.0, "top_p": 1.0, "max_new_tokens": 16}
    assert session(seed=1, **wild).chat("你好").text == session(seed=1, **wild).chat("你好").text
    assert session(seed=1, **wild).chat("你好").text != session(seed=2, **wild).chat("你好").text
    assert len({session(**wild).chat("你好").text for _ in range(3)}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    chat = session()
    with pytest.raises(ValueError, match=message):
        chat.change(**change)
    assert chat.settings == GREEDY


def test_unknown_template_is_refused():
    with pytest.raises(ValueError, match="no template is called 'x'"):
        ChatSession(model(), tokenizer(), template="x")


def test_template_and_system_reach_the_prompt(monkeypatch):
    chat = ChatSession(model(), tokenizer(), template="alpaca", settings=GREEDY, system="Be kind.")
    seen = []
    monkeypatch.setattr(chat.decoder, "stream", lambda ids, **_: seen.append(ids) or tokens_of([7, EOP]))
    chat.history = [("a", "b")]
    chat.chat("c")
    want = "Be kind.\nInstruction: a\nAnswer: b\n\nInstruction: c\nAnswer: "
    assert seen[0].tolist() == tokenizer()([want])["input_ids"]


# The adapter


def test_adapter_is_switched_without_reloading(adapted):
    chat, base = session(adapted), session()
    assert chat.adapter
    tuned = chat.chat("你好")
    chat.clear()
    chat.adapter = False
    plain = chat.chat("你好")
    assert plain.text == base.chat("你好").text != tuned.text
    assert (tuned.adapter, plain.adapter) == (True, False)
    chat.clear()
    chat.adapter = True
    assert chat.chat("你好").text == tuned.text


def test_an_early_end_leaves_the_adapter_on(adapted):
    chat = session(adapted)
    tuned = chat.chat("你好").text
    chat.clear()
    chat.adapter = False
    stream = chat.stream("你好")
    next(stream)
    stream.close()
    chat.clear()
    chat.adapter = True
    assert chat.chat("你好").text == tuned


def test_a_model_without_adapter_says_so():
    chat = session()
    assert not chat.adapter
    with pytest.raises(ValueError, match="has no adapter"):
        chat.adapter = True


# Stopping


def test_stop_from_another_thread_ends_the_answer():
    chat, seen = session(max_new_tokens=2000), []

    def read():
        for answer in chat.stream("你好"):
            seen.append(answer)
            if answer.new_tokens == 3:
                halfway.set()

    halfway = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    halfway.wait(60)
    assert chat.busy
    with pytest.raises(RuntimeError, match="still being written"):
        next(chat.stream("你好"))
    chat.stop()
    reader.join(60)
    assert seen[-1].ended == "stopped"
    assert seen[-1].new_tokens < 2000
    assert chat.history == [("你好", seen[-1].text)]
    assert not chat.busy


def test_one_model_has_one_user_at_a_time(adapted):
    """A second session, or a comparison, would switch the adapter in the middle of the first one's answer."""
    first, second = session(adapted), session(adapted)
    wanted = first.chat("你好").text
    first.clear()
    second.adapter = False
    stream = first.stream("你好")
    next(stream)
    for use in (lambda: second.chat("你好"), lambda: compare(adapted, tokenizer(), ["你好"])):
        with pytest.raises(RuntimeError, match="still being written"):
            use()
    assert deque(stream, maxlen=1).pop().text == wanted
    assert second.chat("你好").text != wanted


def test_an_answer_left_halfway_does_not_block_the_model(adapted):
    """A notebook keeps the frames of the last error, and with them the loop that was interrupted."""
    chat, other = session(adapted), session(adapted)
    wanted = chat.chat("你好").text
    chat.clear()
    abandoned = chat.stream("你好")
    shown = next(abandoned).text
    assert chat.chat("你好").new_tokens
    assert chat.history[0] == ("你好", shown)
    assert list(abandoned) == []
    abandoned = chat.stream("你好")
    next(abandoned)
    with pytest.raises(RuntimeError, match="nobody reads it any more"):
        other.chat("你好")
    chat.clear()
    assert chat.history == []
    assert other.chat("你好").text == wanted


def test_an_interrupted_say_lets_go_of_the_model(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    chat = session()
    monkeypatch.setattr("builtins.print", interrupt)
    with pytest.raises(KeyboardInterrupt) as kept:  # and with it, the frames
        chat.say("你好")
    monkeypatch.undo()
    assert kept.tb
    assert not chat.busy
    assert session().chat("你好").new_tokens


def test_answers_are_without_dropout_and_leave_the_mode_alone():
    torch.manual_seed(0)
    net = get_peft_model(fresh_model(), LoraConfig(r=4, lora_dropout=0.9, target_modules=["query_key_value"]))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    wanted = [session(net.eval()).chat("你好").text, answers(net, tokenizer(), ["你好"])]
    net.train()
    net.get_base_model().transformer.layers[1].eval()
    modes = [module.training for module in net.modules()]
    for _ in range(2):
        assert [session(net).chat("你好").text, answers(net, tokenizer(), ["你好"])] == wanted
    assert [module.training for module in net.modules()] == modes


def test_leaving_the_stream_keeps_what_was_shown():
    chat = session(max_new_tokens=100)
    for answer in chat.stream("你好"):
        if answer.new_tokens == 3:
            break
    assert chat.history == [("你好", answer.text)]
    assert not chat.busy


# What people type


def test_empty_questions_are_refused():
    for query in ("", "   ", "\n\t"):
        with pytest.raises(ValueError, match="question is empty"):
            session().chat(query)


def test_history_is_cut_from_the_front_with_a_notice(tiny, capsys):
    chat = ChatSession(*tiny, settings=Generation(temperature=0, max_new_tokens=8))
    chat.history = [("问" * 400, "答" * 400)] * 4 + [("你叫什么名字？", "我叫TinyGLM。")]
    answer = chat.say("3加4等于几？")
    assert answer.notices == (
        "a model of 2048 tokens cannot see all of this conversation: the oldest 2 turns are left out",
    )
    assert capsys.readouterr().out.startswith(f"[{answer.notices[0]}]\n")
    assert answer.prompt_tokens + 8 <= 2048
    assert len(chat.history) == 6, "what was said is kept; only the prompt is cut"


def test_a_long_question_shortens_the_answer_or_is_refused():
    chat = session(max_new_tokens=512)
    chat.history = [("a", "b")]
    answer = chat.chat("长" * 1990)
    assert answer.notices[-1] == f"only {answer.new_tokens} tokens are left for the answer"
    assert answer.prompt_tokens + answer.new_tokens == 2048
    with pytest.raises(ValueError, match=r"question has 30\d\d tokens.*shorten it by \d+ tokens"):
        chat.chat("长" * 3000)
    assert len(chat.history) == 2


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b", "<sop>", "x <eop> y", "[MASK]", "<pad><unk>", "[gMASK]"])
def test_whatever_is_typed_is_text(text):
    ids = tokenizer()([plain_text(text, tokenizer())])["input_ids"][0]
    assert ids[-2:] == [GMASK, SOP]
    assert not set(ids[:-2]) & {0, 1, 3, 2656, GMASK, SOP, EOP}
    spelled = tokenizer().decode(ids[:-2])
    half = re.sub("[\ud800-\udfff]", " ", text)  # U+FFFD, which the tokenizer reads as a space
    assert spelled.strip() == half.strip()


def test_special_tokens_in_history_and_system_stay_text():
    """The model may write "[gMASK]" itself, and it would start the answer inside the next prompt."""
    chat = session(max_new_tokens=2)
    chat.history, chat.system = [("<sop>", "a [gMASK]"), ("\ud800", "<eop>")], "[MASK]"
    ids = chat._fit("你好")[0][0].tolist()
    assert ids[-2:] == [GMASK, SOP]
    assert not set(ids[:-2]) & {0, 1, 3, 2656, GMASK, SOP, EOP}
    chat.chat("你好")
    assert chat.history[0] == ("<sop>", "a [gMASK]"), "only the prompt is changed"


@pytest.mark.parametrize("query", [None, 5, b"abc", ["a"]])
def test_what_is_no_text_is_refused(query):
    with pytest.raises(TypeError, match="expected text"):
        session().chat(query)


def test_a_turn_that_is_no_pair_is_named():
    chat = session()
    chat.history = [("a", "b"), ("c",)]
    with pytest.raises(ValueError, match="turn 1 of the history"):
        chat.chat("d")


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_any_text_gets_an_answer(text):
    chat = session(max_new_tokens=2)
    if plain_text(text, tokenizer()).strip():
        assert chat.chat(text).new_tokens >= 1


def test_half_a_character_is_not_shown():
    ids = tokenizer()(["👋"])["input_ids"][0][1:-2]  # four byte tokens
    assert len(ids) == 4
    chat = session()
    chat.decoder.stream = lambda *_, **__: tokens_of([*ids, EOP])
    texts = [answer.text for answer in chat.stream("hi")]
    assert texts == ["", "", "", "👋", "👋"]


def test_nan_is_reported_and_not_remembered():
    net = fresh_model()
    with torch.no_grad():
        net.transformer.final_layernorm.bias.fill_(float("nan"))
    chat = session(net)
    with pytest.raises(FloatingPointError, match="NaN"):
        chat.chat("你好")
    assert chat.history == []
    assert not chat.busy
