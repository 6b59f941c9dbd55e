"""The chat template of the tokenizer: the published prompt, at transformers' own doors."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import thuglm
from tests.helpers.reference import tokenizer
from thuglm.prompt import chat_prompt

TINY = Path(__file__).parents[2] / "data" / "tiny-chatglm"
HISTORY = [("你好", "你好！有什么可以帮你的吗？"), ("3+4=", "3+4=7.")]


def messages(turns, query):
    roles = ("user", "assistant")
    said = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    return [*said, {"role": "user", "content": query}]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=4), texts)
def test_the_template_gives_the_published_prompt(turns, query):
    chat = messages(turns, query)
    for more in ({}, {"add_generation_prompt": True}):
        assert tokenizer().apply_chat_template(chat, tokenize=False, **more) == chat_prompt(query, turns)
    assert tokenizer().apply_chat_template(chat).data == tokenizer()(chat_prompt(query, turns)).data


def test_every_form_of_result():
    chats = [messages([], "你是谁？"), messages(HISTORY, "讲个故事")]
    prompts = [chat_prompt("你是谁？"), chat_prompt("讲个故事", HISTORY)]
    got = tokenizer().apply_chat_template(chats, padding=True, return_tensors="pt")
    want = tokenizer()(prompts, padding=True, return_tensors="pt")
    assert all((got[name] == want[name]).all() for name in ("input_ids", "attention_mask"))
    assert tokenizer().apply_chat_template(chats[0], return_dict=False) == tokenizer()(prompts[0])["input_ids"]
    other = tokenizer().apply_chat_template(chats[0], chat_template="{{ messages[0]['content'] }}", return_dict=False)
    assert other == tokenizer()("你是谁？", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (
            [{"role": "system", "content": "你是医生"}, {"role": "user", "content": "你好"}],
            "Message 0 has role 'system'",
        ),
        (messages(HISTORY, "你好")[1:], "Message 0 has role 'assistant'"),
        (messages(HISTORY, "你好")[:-1], "tokenizer\\(prompt, answer\\)"),
        ([{"role": "user", "content": [{"type": "text", "text": "你好"}]}], "texts of"),
    ],
)
def test_other_conversations_are_refused(chat, message):
    with pytest.raises(Exception, match=message):
        tokenizer().apply_chat_template(chat, tokenize=False)


def test_the_template_is_saved_and_another_one_kept(tmp_path):
    tokenizer().save_pretrained(tmp_path / "a")
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    chat = messages(HISTORY, "你好")
    assert again.apply_chat_template(chat).data == tokenizer().apply_chat_template(chat).data
    again.chat_template = "{{ messages[-1]['content'] }}"
    again.save_pretrained(tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").apply_chat_template(chat, tokenize=False) == "你好"


def test_a_pipeline_talks():
    assert isinstance(AutoModelForCausalLM.from_pretrained(TINY), thuglm.ChatGLMForConditionalGeneration)
    talk = pipeline("text-generation", model=str(TINY), dtype="float32")
    first = talk([{"role": "user", "content": "你是谁？"}], max_new_tokens=24, do_sample=False)[0]["generated_text"]
    answer, _ = talk.model.chat(talk.tokenizer, "你是谁？", do_sample=False)
    assert thuglm.ChatGLMForConditionalGeneration.process_response(first[-1]["content"]) == answer
    assert first[:-1] == [{"role": "user", "content": "你是谁？"}]
    again = talk([*first, {"role": "user", "content": "3+4="}], max_new_tokens=24, do_sample=False)
    assert [turn["role"] for turn in again[0]["generated_text"]] == ["user", "assistant"] * 2
