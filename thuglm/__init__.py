"""ChatGLM-6B, native to transformers 5: configuration, model and tokenizer.

Importing this package registers them with the Auto classes, so nothing needs `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from thuglm.configuration_chatglm import ChatGLMConfig
from thuglm.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from thuglm.tokenization_chatglm import ChatGLMTokenizer

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
# The published repository maps AutoModel to the whole model, so that `AutoModel...chat()` works: so does this one.
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)

__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMTokenizer"]
