"""Small files that are broken in the ways real instruction files are: for the notebook to read, and to lose.

good.json  crlf.json  bom.json  lines.jsonl  table.csv          can be read, with care
comma.json  quotes.json  cut_off.json  nulls.json               hold good rows beside bad ones
empty.json  settings.json  moved.json                           hold no rows
"""

import json
from collections.abc import Callable
from pathlib import Path

from glmhelpers.utils.folders import expanded

FILES: dict[str, tuple[int, Callable[[str], str]]] = {
    "good.json": (4, lambda text: text),
    "crlf.json": (4, lambda text: text.replace("\n", "\r\n")),
    "bom.json": (4, lambda text: "\ufeff" + text),
    "lines.jsonl": (4, lambda text: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in json.loads(text))),
    # "N/A" is an answer; pandas takes it for a missing value. The last row has no answer at all.
    "table.csv": (
        3,
        lambda text: (
            'instruction,input,output\nIs there a moon of Venus?,,N/A\n中文,,好\nList two,,"one,\ntwo"\nSay hello,,\n'
        ),
    ),
    "comma.json": (4, lambda text: text[:-2] + ",\n]"),
    "quotes.json": (3, lambda text: text.replace("2+3=5.", 'The answer is "5", as "2+3" says.')),
    "cut_off.json": (3, lambda text: text[:-25]),
    "nulls.json": (2, lambda text: text.replace('"Apple."', "null").replace('"output": "Hello!', '"answer": "Hello!')),
    "empty.json": (0, lambda text: ""),
    "settings.json": (0, lambda text: json.dumps({"learning_rate": 2e-3, "epochs": 3})),
    "moved.json": (0, lambda text: "version 1\noid sha256:4d7a21\nsize 1024\n"),
}
"""Name of a file -> good rows in it, and what becomes of four good rows as JSON."""


def write_broken_files(folder: str | Path) -> dict[str, int]:
    """Write the files into `folder`; returns the name of each and how many good rows are in it.

    Args:
        folder: is made if it is not there; files of these names are written anew.
    """
    folder = expanded(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, spoil) in FILES.items():
        text = json.dumps(_rows(name.partition(".")[0]), ensure_ascii=False, indent=2)
        (folder / name).write_bytes(spoil(text).encode())
    return {name: good for name, (good, _) in FILES.items()}


def _rows(name: str) -> list[dict[str, str]]:
    asked = [
        ("Name a fruit.", "Apple."),
        ("What is 2+3?", "2+3=5."),
        ("天空是什么颜色？", "蓝色。"),
        ("Say hello.", "Hello!"),
    ]
    return [{"instruction": f"{question} ({name})", "input": "", "output": answer} for question, answer in asked]
