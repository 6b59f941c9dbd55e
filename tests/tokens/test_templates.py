"""One template function: equal to the published chat prompts, and to the seed's format."""

import pytest

from glmhelpers.tokens.prompts import TEMPLATES, build_prompt
from tests.helpers.reference import generation_cases


@pytest.mark.parametrize("case", generation_cases()["chat_prompts"])
def test_against_original_chat_prompts(case):
    assert build_prompt(case["query"], case["history"]) == case["prompt"]


def test_a_first_question_stands_bare():
    assert build_prompt("你是谁？") == "你是谁？"
    assert build_prompt("Sort", input="b a") == "Sort\nb a"


def test_the_input_belongs_to_the_last_question():
    assert build_prompt("Sort", [("q", "a")], input="b a") == "[Round 0]\n问：q\n答：a\n[Round 1]\n问：Sort\nb a\n答："


def test_the_template_of_2023():
    assert build_prompt("Sort", template="alpaca", input="b a") == "Instruction: Sort\nInput: b a\nAnswer: "
    assert build_prompt("Sort", template="alpaca") == "Instruction: Sort\nAnswer: "
    assert build_prompt("c", [("a", "b")], "alpaca") == "Instruction: a\nAnswer: b\n\nInstruction: c\nAnswer: "


@pytest.mark.parametrize("template", TEMPLATES)
def test_system_stands_at_the_top(template):
    assert build_prompt("q", template=template, system="Be brief.").startswith("Be brief.\n")


def test_wrong_calls_say_what_was_found():
    with pytest.raises(ValueError, match=r"'gpt'.*alpaca.*chatglm"):
        build_prompt("q", template="gpt")
    with pytest.raises(ValueError, match="turn 1"):
        build_prompt("q", [("a", "b"), ("only",)])
    with pytest.raises(ValueError, match="turn 0"):
        build_prompt("q", [("a", None)])
