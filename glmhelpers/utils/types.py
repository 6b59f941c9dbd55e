"""Names for types that checkers cannot know.

torch types every attribute of a module as `Tensor | Module`, so that `model.transformer.layers[0]` is an error to a
type checker, whatever the class. Where code looks inside a model, its parameter is a `Model`.
"""

from typing import Any

Model = Any
"""A `ChatGLMForConditionalGeneration`, bare or inside a `PeftModel`."""


class Told:
    """For an exception whose sentence says all there is to do: Jupyter shows it alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
