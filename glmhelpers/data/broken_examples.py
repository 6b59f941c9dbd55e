"""Small files that are broken in the ways real instruction files are: for the notebook to read, and to lose.

good.json  crlf.json  bom.json  lines.jsonl  table.csv          can be read, with care
comma.json  quotes.json  cut_off.json  nulls.json               hold good rows beside bad ones
empty.json  settings.json  moved.json                           hold no rows
"""

import json
from pathlib import Path


def write_broken_files(folder: Path) -> dict[str, int]:
    """Write the files into `folder`; returns the name of each and how many good rows are in it.

    Args:
        folder: is made if it is not there; files of these names are written anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: (_content(name), good) for name, good in GOOD_ROWS.items()}
    for name, (content, _) in made.items():
        (folder / name).write_bytes(content)
    return {name: good for name, (_, good) in made.items()}


GOOD_ROWS = {
    "good.json": 4,
    "crlf.json": 4,
    "bom.json": 4,
    "lines.jsonl": 4,
    "table.csv": 3,
    "comma.json": 4,
    "quotes.json": 3,
    "cut_off.json": 3,
    "nulls.json": 2,
    "empty.json": 0,
    "settings.json": 0,
    "moved.json": 0,
}
"""Name of a file -> good rows in it."""


def _rows(name: str) -> list[dict[str, str]]:
    asked = [
        ("Name a fruit.", "Apple."),
        ("What is 2+3?", "2+3=5."),
        ("天空是什么颜色？", "蓝色。"),
        ("Say hello.", "Hello!"),
    ]
    return [{"instruction": f"{question} ({name})", "input": "", "output": answer} for question, answer in asked]


def _content(name: str) -> bytes:
    rows = _rows(name.partition(".")[0])
    text = json.dumps(rows, ensure_ascii=False, indent=2)
    if name == "crlf.json":
        text = text.replace("\n", "\r\n")
    elif name == "bom.json":
        text = "\ufeff" + text
    elif name == "lines.jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif name == "table.csv":
        # "N/A" is an answer; pandas takes it for a missing value. The last row has no answer at all.
        text = (
            'instruction,input,output\nIs there a moon of Venus?,,N/A\n中文,,好\nList two,,"one,\ntwo"\nSay hello,,\n'
        )
    elif name == "comma.json":
        text = text[:-2] + ",\n]"
    elif name == "quotes.json":
        text = text.replace("2+3=5.", 'The answer is "5", as "2+3" says.')
    elif name == "cut_off.json":
        text = text[:-25]
    elif name == "nulls.json":
        text = text.replace('"Apple."', "null").replace('"output": "Hello!"', '"answer": "Hello!"')
    elif name == "empty.json":
        text = ""
    elif name == "settings.json":
        text = json.dumps({"learning_rate": 2e-3, "epochs": 3})
    elif name == "moved.json":
        text = "version 1\noid sha256:4d7a21\nsize 1024\n"
    return text.encode()
