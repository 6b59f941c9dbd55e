"""ChatGLM-6B, native to transformers 5: configuration, model and tokenizer.

Importing this package registers them with the Auto classes, so nothing needs `trust_remote_code`. What is not asked for
is not loaded: the tokenizer needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thuglm.auto_classes import register

if TYPE_CHECKING:
    from thuglm.configuration_chatglm import ChatGLMConfig
    from thuglm.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
    from thuglm.tokenization_chatglm import ChatGLMTokenizer

__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMTokenizer"]
_HOMES = {"ChatGLMConfig": "configuration_chatglm", "ChatGLMTokenizer": "tokenization_chatglm"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'modeling_chatglm')}"), name)


register()
