"""transformers' common tests of models, configurations and tokenizers, with ours."""

import shutil
import tempfile
import unittest
from pathlib import Path

import torch
from transformers.models.auto import modeling_auto
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_tokenization_common import TokenizerTesterMixin

import thuglm

# By these lists the tests know which class has a loss.
modeling_auto.MODEL_MAPPING_NAMES["chatglm"] = "ChatGLMModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["chatglm"] = "ChatGLMForConditionalGeneration"

CHECKPOINT = Path(__file__).parents[2] / "data" / "tiny-chatglm"
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 37}
# Low ids, since some tests make the vocabulary smaller.
IDS = {"bos_token_id": 7, "eos_token_id": 6, "mask_token_id": 5, "gmask_token_id": 4, "pad_token_id": 3}


class ModelTester:
    """Sizes and inputs, as transformers' tests ask for them."""

    batch_size, seq_length, encoder_seq_length, key_length = 13, 7, 7, 7
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    is_training, vocab_size = True, 99

    def get_config(self):
        return thuglm.ChatGLMConfig(**SIZES, **IDS, max_sequence_length=512)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(8, 90, (self.batch_size, self.seq_length))
        ids[:, 3], ids[:, 4] = IDS["gmask_token_id"], IDS["bos_token_id"]
        ids[:, 5] = 0  # for a test that makes every special id 0
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestModel(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (thuglm.ChatGLMModel, thuglm.ChatGLMForConditionalGeneration)
    model_tester = ModelTester()


class TestConfiguration(unittest.TestCase):
    def test_config(self):
        ConfigTester(self, config_class=thuglm.ChatGLMConfig, hidden_size=32, num_attention_heads=4).run_common_tests()


class TestTokenizer(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = thuglm.ChatGLMTokenizer
    from_pretrained_id = str(CHECKPOINT)
    test_sentencepiece = True

    @classmethod
    def setUpClass(cls):  # as there, but for a text that is not in the archive
        cls.tokenizers_list = [(cls.tokenizer_class, cls.from_pretrained_id, {})]
        cls._data = Path(__file__).with_name("README.md").read_text("utf-8")
        cls.tmpdirname = tempfile.mkdtemp()
        cls.tokenizer_class.from_pretrained(cls.from_pretrained_id).save_pretrained(cls.tmpdirname)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.tmpdirname)
