"""The Auto classes of transformers know ChatGLM as soon as they are loaded, and nothing of ours is loaded before.

    import thuglm                           nothing else is loaded: no transformers, no torch
    from transformers import AutoModel  ──► module transformers.models.auto.modeling_auto is loaded
                                            └──► thuglm's part is loaded behind it, and registered with it

The Auto classes bring torch and much of transformers: 5 seconds and 200 MB, of which a conversion of data uses nothing.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType


def _register_tokenizer(auto: ModuleType) -> None:
    config = import_module("thuglm.configuration_chatglm").ChatGLMConfig
    tokenizer = import_module("thuglm.tokenization_chatglm").ChatGLMTokenizer
    auto.AutoTokenizer.register(config, slow_tokenizer_class=tokenizer, exist_ok=True)


# Configuration and model need torch anyway, so these two register themselves at the end of their modules. (A part of
# the Auto classes is loaded while the model's module is: then there is no model yet.)
_BEHIND = {
    "transformers.models.auto.configuration_auto": lambda _: import_module("thuglm.configuration_chatglm"),
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
    "transformers.models.auto.modeling_auto": lambda _: import_module("thuglm.modeling_chatglm"),
}


class _Behind(MetaPathFinder):
    """Finds the modules of the Auto classes as Python would, and has ours loaded behind them."""

    def find_spec(self, fullname, path=None, target=None):
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _BEHIND else None
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_both(module: ModuleType) -> None:
                load(module)
                _BEHIND[fullname](module)

            spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


def register() -> None:
    """See to it that every Auto class knows ChatGLM, now or when it is loaded."""
    sys.meta_path.insert(0, _Behind())
    for name, load in _BEHIND.items():
        if name in sys.modules:
            load(sys.modules[name])
