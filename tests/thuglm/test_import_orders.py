"""Whoever imports what first: tokens need no torch, and the Auto classes know ChatGLM."""

import subprocess
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "data" / "tiny-chatglm"
THERE = f"""
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
assert type(AutoConfig.from_pretrained({str(TINY)!r})).__module__ == "thuglm.configuration_chatglm"
assert type(AutoTokenizer.from_pretrained({str(TINY)!r})).__name__ == "ChatGLMTokenizer"
assert type(AutoModelForCausalLM.from_pretrained({str(TINY)!r})).__name__ == "ChatGLMForConditionalGeneration"
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_data_and_tokens_need_no_torch():
    run(
        "import sys, glmhelpers.data, glmhelpers.tokens\n"
        "from thuglm import ChatGLMTokenizer\n"
        f"tokenizer = ChatGLMTokenizer.from_pretrained({str(TINY)!r})\n"
        "glmhelpers.tokens.encode_example(tokenizer, {'instruction': 'a', 'output': 'b'})\n"
        "assert not {'torch', 'accelerate', 'peft'} & sys.modules.keys()\n" + THERE
    )


@pytest.mark.parametrize(
    "first",
    ["import thuglm", "import transformers.models.auto.modeling_auto\nimport thuglm", "import thuglm.modeling_chatglm"],
    ids=["thuglm", "the Auto classes", "the model"],
)
def test_auto_classes_know_the_model(first):
    run(f"{first}\n{THERE}")


def test_a_name_that_is_not_there():
    with pytest.raises(ImportError, match="cannot import name 'ChatGLM'"):
        from thuglm import ChatGLM  # noqa: F401
