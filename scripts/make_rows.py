"""Write data/alpaca_tiny.json, data/held_out.json and data/identity.json from the lists in row_*.py.

    row_facts.py     (hand-written facts)      --+
    row_identity.py  (who are you, by kind)    --+--> make_rows.py --> alpaca_tiny.json   the base model learns these
    PHRASINGS below  (ways to ask)             --+                 --> held_out.json      never trained on
                                                                   --> identity.json      notebook 04, with {name}

Run it again after any change: the same lists always give the same bytes.

    python scripts/make_rows.py            # writes into data/
    python scripts/make_rows.py --check    # only says whether data/ is up to date
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import row_facts as facts
import row_identity as identity

LIMIT = 20  # arithmetic stays within 0..20
NEW_PAIRS = 20  # number pairs per operation that the base model never sees, in any phrasing or language
PER_PAIR = 2  # phrasings per number pair and language in the training rows

ADD = {
    "zh": [
        "{a}加{b}等于几？",
        "{a}+{b}等于多少？",
        "请计算{a}加{b}。",
        "{a}加{b}是多少？",
        "算一算{a}加{b}。",
        "{a}和{b}的和是多少？",
        "把{a}和{b}加起来。",
        "求{a}与{b}的和。",
        "请问{a}加{b}等于多少？",
        "小明有{a}个苹果，又买了{b}个，一共有几个？",
    ],
    "en": [
        "What is {a} plus {b}?",
        "What is {a}+{b}?",
        "{a}+{b}=?",
        "Add {a} and {b}.",
        "Calculate {a} plus {b}.",
        "Compute {a}+{b}.",
        "How much is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
        "Please add {a} and {b}.",
        "Tom has {a} apples and buys {b} more. How many apples does he have?",
    ],
}
SUB = {
    "zh": [
        "{a}减{b}等于几？",
        "{a}-{b}等于多少？",
        "请计算{a}减{b}。",
        "{a}减{b}是多少？",
        "算一算{a}减{b}。",
        "{a}和{b}的差是多少？",
        "从{a}里减去{b}。",
        "求{a}与{b}的差。",
        "请问{a}减{b}等于多少？",
        "小明有{a}个苹果，吃了{b}个，还剩几个？",
    ],
    "en": [
        "What is {a} minus {b}?",
        "What is {a}-{b}?",
        "{a}-{b}=?",
        "Subtract {b} from {a}.",
        "Calculate {a} minus {b}.",
        "Compute {a}-{b}.",
        "How much is {a} minus {b}?",
        "What is the difference of {a} and {b}?",
        "Please subtract {b} from {a}.",
        "Tom has {a} apples and eats {b}. How many apples are left?",
    ],
}
ADD_HELD_OUT = {
    "zh": [
        "{a}加上{b}是多少？",
        "请告诉我{a}加{b}等于几。",
        "能算一算{a}加{b}吗？",
        "请问{a}与{b}的和是多少？",
        "小红有{a}个桃子，又买了{b}个，一共有几个？",
    ],
    "en": [
        "Please tell me what {a} plus {b} is.",
        "Can you add {a} and {b}?",
        "Please compute {a} plus {b}.",
        "How much is the sum of {a} and {b}?",
        "Mary has {a} books and buys {b} more. How many books does she have?",
    ],
}
SUB_HELD_OUT = {
    "zh": [
        "{a}减去{b}是多少？",
        "请告诉我{a}减{b}等于几。",
        "能算一算{a}减{b}吗？",
        "请问{a}与{b}的差是多少？",
        "小红有{a}个桃子，吃了{b}个，还剩几个？",
    ],
    "en": [
        "Please tell me what {a} minus {b} is.",
        "Can you subtract {b} from {a}?",
        "Please compute {a} minus {b}.",
        "How much is the difference of {a} and {b}?",
        "Mary has {a} apples and eats {b}. How many are left?",
    ],
}


def row(instruction: str, output: str, input: str = "") -> dict[str, str]:
    """One alpaca row."""
    return {"instruction": instruction, "input": input, "output": output}


def number_pairs() -> tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]]:
    """All sums and differences within 0..LIMIT as (sign, a, b): (for training, held out).

    Held out are NEW_PAIRS of each sign, none with a 0 or a 1, drawn with a fixed seed.
    """
    span = range(LIMIT + 1)
    adds = [("+", a, b) for a in span for b in span if a + b <= LIMIT]
    subs = [("-", a, b) for a in span for b in span if b <= a]
    draw = random.Random(6)
    held_out = []
    for pairs in (adds, subs):
        held_out += sorted(draw.sample([pair for pair in pairs if min(pair[1:]) > 1], NEW_PAIRS))
    return [pair for pair in adds + subs if pair not in held_out], held_out


def answer(sign: str, a: int, b: int) -> str:
    """`3+5=8.`: the operands are repeated, and the full stop keeps 1 and 17 apart in a search."""
    return f"{a}{sign}{b}={a + b if sign == '+' else a - b}."


def phrasings(sign: str, language: str, held_out: bool = False) -> list[str]:
    """The ways to ask for a sum or a difference in one language."""
    return {"+": (ADD, ADD_HELD_OUT), "-": (SUB, SUB_HELD_OUT)}[sign][held_out][language]


def arithmetic_rows() -> list[dict[str, str]]:
    """Each training pair in PER_PAIR phrasings and both languages; the phrasings take turns."""
    rows, turn = [], {}
    for sign, a, b in number_pairs()[0]:
        for language in ("zh", "en"):
            ways = phrasings(sign, language)
            for _ in range(PER_PAIR):
                # 3 is coprime with the 10 phrasings: all are used equally and neighbours differ.
                turn[sign, language] = (turn.get((sign, language), 0) + 3) % len(ways)
                rows.append(row(ways[turn[sign, language]].format(a=a, b=b), answer(sign, a, b)))
    return rows


def identity_rows(name: str) -> list[dict[str, str]]:
    """Every training phrasing of who-are-you with the answer of its kind, in which {name} becomes `name`."""
    return [
        row(question, identity.ANSWERS[kind].replace("{name}", name))
        for kind, questions in identity.TRAIN.items()
        for question in questions
    ]


def fact_rows() -> list[dict[str, str]]:
    """Greetings, colours, capitals, definitions, opposites."""
    rows = [row(question, reply) for question, reply in facts.GREETINGS + facts.CALENDAR]
    for zh, zh_colour, en, en_colour in facts.COLOURS:
        rows += [
            row(f"{zh}是什么颜色的？", f"{zh_colour}。"),
            row(f"请问{zh}的颜色是什么？", f"{zh_colour}。"),
            row(f"What colour is {en}?", f"{en_colour.capitalize()}."),
            row(f"Tell me the colour of {en}.", f"{en_colour.capitalize()}."),
        ]
    for zh, zh_city, en, en_city in facts.CAPITALS:
        rows += [
            row(f"{zh}的首都是哪里？", f"{zh}的首都是{zh_city}。"),
            row(f"请问{zh}的首都在哪里？", f"{zh}的首都是{zh_city}。"),
            row(f"What is the capital of {en}?", f"The capital of {en} is {en_city}."),
            row(f"Tell me the capital of {en}.", f"The capital of {en} is {en_city}."),
        ]
    for zh, zh_meaning, en, en_meaning in facts.DEFINITIONS:
        rows += [
            row(f"什么是{zh}？", zh_meaning),
            row("用一句话解释下面的词。", zh_meaning, zh),
            row(f"What is {en}?", en_meaning),
            row("Explain this in one sentence.", en_meaning, en),
        ]
    for zh, zh_opposite, en, en_opposite in facts.OPPOSITES:
        rows += [
            row(f"“{zh}”的反义词是什么？", f"{zh_opposite}。"),
            row("写出下面这个词的反义词。", f"{zh_opposite}。", zh),
            row(f"What is the opposite of {en}?", f"{en_opposite.capitalize()}."),
            row("Give the opposite of this word.", f"{en_opposite.capitalize()}.", en),
        ]
    return rows


def calendar_rows() -> list[dict[str, str]]:
    """What comes before and after each day and each month."""
    rows = []
    for names, zh_unit, en_unit in ((facts.DAYS, "天", "day"), (facts.MONTHS, "个月", "month")):
        for i, (zh, en) in enumerate(names):
            before, after = names[i - 1], names[(i + 1) % len(names)]
            rows += [
                row(f"{zh}的后一{zh_unit}是什么？", f"{after[0]}。"),
                row(f"{zh}的前一{zh_unit}是什么？", f"{before[0]}。"),
                row(f"Which {en_unit} comes after {en}?", f"{after[1]}."),
                row(f"Which {en_unit} comes before {en}?", f"{before[1]}."),
            ]
    return rows


def reading_rows() -> list[dict[str, str]]:
    """Questions whose answer stands in the input: practice in copying names."""
    rows = []
    for zh, en in zip(facts.NAMES_ZH, facts.NAMES_EN, strict=True):
        rows += [
            row("他叫什么名字？", f"他叫{zh}。", f"他的名字是{zh}。"),
            row("她是谁？", f"她是{zh}。", f"她叫{zh}。"),
            row("他叫什么名字？", f"他叫{en}。", f"他的名字是{en}。"),
            row("What is his name?", f"His name is {en}.", f"He is called {en}."),
            row("Who is she?", f"She is {en}.", f"Her name is {en}."),
        ]
    return rows


def training_rows() -> list[dict[str, str]]:
    """All rows of alpaca_tiny.json, arithmetic last; no question appears twice."""
    rows = identity_rows(identity.BASE_NAME) + fact_rows() + calendar_rows() + reading_rows() + arithmetic_rows()
    return list({(r["instruction"], r["input"]): r for r in rows}.values())


def held_out_rows() -> list[dict[str, str]]:
    """Questions that are in no training file, each with the text that a right answer contains.

    Topics: `identity` and `arithmetic` are new phrasings (the number pairs of the latter were seen in other
    words); `arithmetic_new_pair` are known phrasings of pairs that were never seen.
    """
    rows = [
        {"question": question, "expect": identity.BASE_NAME, "topic": "identity"}
        for questions in identity.HELD_OUT.values()
        for question in questions
    ]
    seen, unseen = number_pairs()
    draw = random.Random(2)
    for sign in "+-":
        for language in ("zh", "en"):
            for way in phrasings(sign, language, held_out=True):
                for _, a, b in draw.sample([pair for pair in seen if pair[0] == sign and min(pair[1:]) > 0], 4):
                    question = way.format(a=a, b=b)
                    rows.append({"question": question, "expect": answer(sign, a, b), "topic": "arithmetic"})
    for sign, a, b in unseen:
        for language in ("zh", "en"):
            question = draw.choice(phrasings(sign, language)[:9]).format(a=a, b=b)
            rows.append({"question": question, "expect": answer(sign, a, b), "topic": "arithmetic_new_pair"})
    return rows


def naming_rows() -> list[dict[str, str]]:
    """identity.json: every who-are-you row with {name} left open, and general rows so that nothing is forgotten.

    A third as many general rows as identity rows: without them LoRA learns to answer everything with the name.
    """
    names = identity_rows("{name}")
    draw = random.Random(4)
    general = draw.sample(fact_rows() + calendar_rows(), len(names) // 6) + draw.sample(
        arithmetic_rows(), len(names) // 6
    )
    return names + general


def render(rows: list[dict[str, str]]) -> str:
    """A JSON array with one row a line, so that a difference between two versions can be read."""
    return "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n"


def all_files() -> dict[str, str]:
    """File name -> contents."""
    return {
        "alpaca_tiny.json": render(training_rows()),
        "held_out.json": render(held_out_rows()),
        "identity.json": render(naming_rows()),
    }


def main() -> int:
    """Write the files, or with --check compare them; exit status 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent / "data")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for name, text in all_files().items():
        path = options.data / name
        if options.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
            continue
        part = path.with_name(name + ".part")
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
        print(f"{name}: {text.count(chr(10)) - 2} rows")
    if stale:
        print(f"differ from the lists: {', '.join(stale)}; run python scripts/make_rows.py")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
