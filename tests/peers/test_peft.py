"""peft's tests of decoder models, with ours in the place of theirs."""

import atexit
import shutil
import tempfile
from pathlib import Path

import datasets
import peft.utils.constants as targets
import pytest
import torch
import transformers
from peft_tests import test_decoder_models
from peft_tests.test_decoder_models import TestDecoderModels as TheirTests

import thuglm

# Where peft knows no layers of this model (for LoRA it does), the tests take those that it knows for LoRA.
for name, known in vars(targets).items():
    if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
        known.setdefault("chatglm", ["query_key_value"])
targets.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["chatglm"] = ["query_key_value", "mlp.dense_4h_to_h"]
targets.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["chatglm"] = ["mlp.dense_4h_to_h"]

TINY = Path(__file__).parents[2] / "data" / "tiny-chatglm"


def checkpoint() -> str:
    """A random model for ids that their tests write down, such as [[1, 1, 1], [2, 1, 2]]: 1 ends a prompt here. Weights
    are large, since the tests want to see what an adapter changes."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 128}
    more = {"initializer_range": 0.15, "bos_token_id": 1, "gmask_token_id": 1}
    config = thuglm.ChatGLMConfig.from_pretrained(TINY, **sizes, **more)
    torch.manual_seed(0)
    thuglm.ChatGLMForConditionalGeneration(config).save_pretrained(folder)
    thuglm.ChatGLMTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


NUMBERS = checkpoint()


def instead(mark):
    """The mark with our model for theirs; the grid of five models is for texts."""
    if mark.name != "parametrize" or mark.args[0] != "model_id":
        return mark
    model = str(TINY) if mark.args[1] is test_decoder_models.SMALL_GRID_MODELS else NUMBERS
    return pytest.mark.parametrize("model_id", [pytest.param(model, id="chatglm")]).mark


for test in vars(TheirTests).values():
    if marks := getattr(test, "pytestmark", None):
        test.pytestmark = [instead(mark) for mark in marks]

test_decoder_models.PEFT_DECODER_MODELS_TO_TEST[:] = [NUMBERS]
TEXTS = datasets.DatasetDict(train=datasets.Dataset.from_dict({"quote": ["3+4=", "你是谁？", "Tell me a story."] * 8}))
test_decoder_models.load_dataset_english_quotes = lambda: TEXTS


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Models that a test names itself are ours too."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.AutoConfig):
        there = auto.from_pretrained

        def here(name, *args, there=there, **kwargs):
            ours = TINY if "Mistral" in str(name) else NUMBERS
            return there(name if Path(name).is_dir() else ours, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", here)


class TestPeft(TheirTests):
    def prepare_inputs_for_testing(self):
        ids = torch.tensor([[9, 8, 1, 3], [3, 7, 1, 2]])
        return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])}


del TheirTests  # collected once
