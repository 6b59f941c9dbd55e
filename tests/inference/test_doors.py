"""What people hand to a chat, whatever its form: understood, or refused in one sentence."""

import pytest
import torch

from glmhelpers.inference.batch import answer, answers, compare
from glmhelpers.inference.chat import ChatSession, Generation
from glmhelpers.inference.decoder import Decoder
from glmhelpers.lora import next_logits
from glmhelpers.tokens.prompts import build_prompt
from tests.helpers.reference import adapted_model, fresh_model, model, tokenizer
from tests.helpers.tiny_models import PROMPTS, lora
from thuglm.prompt import as_turns, chat_prompt, process_response

PAIRS = [("你好", "你好！"), ("1+1=", "2")]
MESSAGES = [{"role": role, "content": text} for pair in PAIRS for role, text in zip(("user", "assistant"), pair)]  # noqa: B905
GREEDY = {"do_sample": False, "max_new_tokens": 8}


# Histories ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [MESSAGES, [list(pair) for pair in PAIRS], [PAIRS[0], *MESSAGES[2:]]])
def test_every_form_of_a_history_is_the_same_conversation(history):
    assert as_turns(history) == PAIRS
    assert build_prompt("再见", history) == build_prompt("再见", PAIRS) == chat_prompt("再见", history)
    want = model().chat(tokenizer(), "再见", PAIRS, **GREEDY)
    assert model().chat(tokenizer(), "再见", history, **GREEDY) == want
    assert want[1][:2] == PAIRS
    *_, last = model().stream_chat(tokenizer(), "再见", history, **GREEDY)
    assert last[1][:2] == PAIRS
    session = ChatSession(model(), tokenizer(), settings=Generation(temperature=0, max_new_tokens=8))
    session.history = list(history)
    assert session.chat("再见").text == want[0] == answer(model(), tokenizer(), "再见", history, max_new_tokens=8)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (["你好", "你好！"], r"turn 0 of the history is '你好'; expected \(question, answer\)"),
        ("你好", "the history is a str"),
        ({"role": "user", "content": "你好"}, "the history is a dict"),
        ([("你好",)], "turn 0"),
        ([("你好", None)], "turn 0"),
        (MESSAGES[1:], r"turn 0 .*'role': 'user'"),
        ([MESSAGES[0], MESSAGES[2]], "turn 1"),
        ([MESSAGES[0], PAIRS[1]], "turn 1 .*the assistant's answer"),
        ([{"role": "system", "content": "x"}], "turn 0"),
        (MESSAGES[:3], "ends with the question '1\\+1=', unanswered"),
    ],
)
def test_a_history_of_another_form_is_refused(history, message):
    for call in (
        lambda: model().chat(tokenizer(), "再见", history, **GREEDY),
        lambda: next(model().stream_chat(tokenizer(), "再见", history, **GREEDY)),
        lambda: answers(model(), tokenizer(), ["再见"], history),
        lambda: build_prompt("再见", history),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_one_text_is_no_list_of_questions():
    for call in (answers, compare):
        with pytest.raises(TypeError, match="put it in a list"):
            call(adapted_model(), tokenizer(), "你好")
    with pytest.raises(TypeError, match="the query is a dict"):
        model().chat(tokenizer(), MESSAGES[0])


# Arguments of generate -----------------------------------------------------------------------------------------------


def test_several_answers_to_one_question_are_refused():
    several = {"do_sample": True, "num_return_sequences": 2}
    net = adapted_model()
    for call in (
        lambda: answers(model(), tokenizer(), PROMPTS, **several),
        lambda: compare(net, tokenizer(), PROMPTS, **several),
        lambda: model().chat(tokenizer(), "你好", **several),
    ):
        with pytest.raises(ValueError, match="num_return_sequences"):
            call()
    assert answers(model(), tokenizer(), PROMPTS, num_return_sequences=1) == answers(model(), tokenizer(), PROMPTS)


def test_a_dictionary_of_results_is_read():
    more = {"return_dict_in_generate": True, "output_scores": True}
    assert answers(model(), tokenizer(), PROMPTS, **more) == answers(model(), tokenizer(), PROMPTS)
    assert model().chat(tokenizer(), "你好", **GREEDY, **more) == model().chat(tokenizer(), "你好", **GREEDY)


# The end of an answer ------------------------------------------------------------------------------------------------


def test_half_a_character_is_no_part_of_an_answer(monkeypatch):
    ids = tokenizer().encode("好🐉", add_special_tokens=False)
    assert len(ids) >= 5, "this tokenizer knows the emoji"
    for count in range(2, len(ids) + 1):
        want = "好🐉" if count == len(ids) else "好"
        session = ChatSession(model(), tokenizer(), settings=Generation(max_new_tokens=count))
        session.decoder.stream = lambda *args, **kwargs: ([token] for token in ids)
        shown = [answer.text for answer in session.stream("你好")]
        assert shown[-1] == session.history[-1][1] == want
        assert not any("\ufffd" in text for text in shown)

        def write(input_ids, count=count, streamer=None, **kwargs):
            new = torch.tensor([ids[:count]])
            for part in (input_ids, *new[0]) if streamer else ():
                streamer.put(part)
            if streamer:
                streamer.end()
            return torch.cat((input_ids, new), dim=1)

        net = fresh_model()
        monkeypatch.setattr(net, "generate", write)
        assert net.chat(tokenizer(), "你好")[0] == net.chat(tokenizer(), "你好")[1][-1][1] == want
        assert answers(net, tokenizer(), ["你好"]) == [want]
        assert not any("\ufffd" in text for text, _ in net.stream_chat(tokenizer(), "你好"))
    assert process_response("a\ufffdb") == "a\ufffdb"


def test_near_the_limit_a_short_answer_is_still_possible():
    session = ChatSession(model(), tokenizer(), settings=Generation(temperature=0, max_new_tokens=4))
    ids = len(tokenizer()("长" * 100)["input_ids"])
    question = "长" * (100 + 2048 - 4 - ids)
    answer = session.chat(question)
    assert answer.prompt_tokens == 2044
    assert answer.new_tokens <= 4
    session.clear()
    with pytest.raises(ValueError, match=r"has 2045 tokens.*and 4 are kept for the answer: shorten it by 1 "):
        session.chat(question + "长")


def test_a_history_is_cut_where_trying_every_length_would_cut_it():
    turns = [(f"{i}+{i}=", f"{i}+{i}={2 * i}，" * (1 + i % 7)) for i in range(90)]
    for wanted in (4, 200, 600):
        session = ChatSession(model(), tokenizer(), settings=Generation(max_new_tokens=wanted))
        for count in (0, 1, 2, 5, 60, 90):
            session.history = turns[:count]
            input_ids, room, notices = session._fit("再见")
            for left_out in range(count + 1):
                prompt = chat_prompt("再见", turns[left_out:count])
                want = tokenizer()([prompt], return_tensors="pt")["input_ids"]
                if 2048 - want.shape[1] >= min(wanted, 512):
                    break
            assert input_ids.tolist() == want.tolist()
            assert room == min(wanted, 2048 - want.shape[1])
            assert bool(notices) == bool(left_out)


def test_fitting_a_history_reads_no_more_of_it_than_a_model_can(monkeypatch):
    session = ChatSession(model(), tokenizer(), settings=Generation(max_new_tokens=100))
    session.history, read = [("你好", "你好！")] * 5000, []
    encode = type(tokenizer()).__call__
    monkeypatch.setattr(
        type(tokenizer()), "__call__", lambda self, texts, **more: read.extend(texts) or encode(self, texts, **more)
    )
    _, _, (notice,) = session._fit("再见")
    assert "turns are left out" in notice
    assert len(read) < 30
    assert sum(map(len, read)) < 30 * 2 * 2048 < len(chat_prompt("再见", session.history)) * 2


# Dropout -------------------------------------------------------------------------------------------------------------


def test_a_model_that_was_just_trained_answers_without_dropout():
    net = lora(fresh_model(), dropout=0.5)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.mul_(30)
    net.eval()
    batch = tokenizer()(PROMPTS, padding=True, return_tensors="pt")

    def doors():
        return (
            next_logits(net, tokenizer(), PROMPTS).tolist(),
            Decoder(net).generate(**batch, max_new_tokens=8),
            net.chat(tokenizer(), PROMPTS[1], **GREEDY),
            list(net.stream_chat(tokenizer(), PROMPTS[1], **GREEDY)),
            answers(net, tokenizer(), PROMPTS),
            ChatSession(net, tokenizer(), settings=Generation(temperature=0, max_new_tokens=8)).chat("你好").text,
        )

    want = doors()
    net.train()
    assert doors() == want
    assert net.training
    assert all(module.training for module in net.modules() if isinstance(module, torch.nn.Dropout))


# Values of another kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: it must be a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number"),
        ({"top_p": None}, "top_p is None: it must be a number"),
        ({"seed": "x"}, "seed is 'x': it must be a whole number"),
        ({"seed": 2**70}, "seed is 1180591620717411303424: it must be a whole number of at most 64 bits"),
    ],
)
def test_a_setting_of_another_kind_is_refused_before_anything_is_asked(settings, message):
    with pytest.raises(ValueError, match=message):
        Generation(**settings)


def test_what_has_no_order_is_no_history_and_no_list_of_questions():
    """Python orders a set of texts otherwise in each process; a mapping would be asked its keys."""
    with pytest.raises(ValueError, match="the history is a set; expected a list"):
        model().chat(tokenizer(), "再见", set(PAIRS), **GREEDY)
    for questions in ({"你好"}, {"你好": "再见"}, 5):
        with pytest.raises(TypeError, match=r"questions is a (set|dict|int): expected a list of texts"):
            answers(model(), tokenizer(), questions)


def test_an_answer_after_a_history_that_is_a_tuple_is_not_lost():
    session = ChatSession(model(), tokenizer(), settings=Generation(temperature=0, max_new_tokens=8))
    session.history = tuple(PAIRS)
    answer = session.chat("再见")
    assert session.history == [*PAIRS, ("再见", answer.text)]


def test_none_for_a_list_of_processors_is_an_empty_list():
    want = model().chat(tokenizer(), "你好", **GREEDY)
    assert model().chat(tokenizer(), "你好", logits_processor=None, stopping_criteria=None, **GREEDY) == want
    *_, last = model().stream_chat(tokenizer(), "你好", **GREEDY)
    *_, same = model().stream_chat(tokenizer(), "你好", logits_processor=None, stopping_criteria=None, **GREEDY)
    assert same == last


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ([[5, 6]], "list"),
        (torch.tensor([5, 6]), r"int64 \[2\]"),
        (torch.tensor([[5.0, 6.0]]), r"float32 \[1, 2\]"),
        (torch.tensor([[[5, 6]]]), r"int64 \[1, 1, 2\]"),
    ],
)
def test_ids_that_are_none_are_named(ids, what):
    with pytest.raises(ValueError, match=rf"input_ids are {what}; expected a tensor of whole numbers, \[B, L\]"):
        model()(input_ids=ids)
