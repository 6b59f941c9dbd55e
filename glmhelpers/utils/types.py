"""Names for types that checkers cannot know.

torch types every attribute of a module as `Tensor | Module`, so that `model.transformer.layers[0]` is an error to a
type checker, whatever the class. Where code looks inside a model, its parameter is a `Model`.
"""

from typing import Any

Model = Any
"""A `ChatGLMForConditionalGeneration`, bare or inside a `PeftModel`."""
