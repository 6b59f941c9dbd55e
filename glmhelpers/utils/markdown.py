"""Small tables as Markdown, for `IPython.display.Markdown`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A Markdown table with one line for each row.

    Args:
        rows: mappings with the same keys.
        columns: which keys, in this order; all of the first row if None.
    """
    columns = list(columns or rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row[column]) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = str(value).replace("<", "&lt;").replace("\n", "<br>")
    return re.sub(r"([|\[\]_*`])", r"\\\1", text)
