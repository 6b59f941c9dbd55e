"""A made-up corpus of the size and the lengths of alpaca_chinese_dataset, for measurements where it is not at hand.

82,561 rows in 43 files; characters of the prompt at the 50, 90 and 99 % points: 53, 117, 289; of the answer: 99, 536,
1078. The sentences are ours and mean little: only their lengths, scripts and layout matter here.
"""

import json
import random
from itertools import pairwise
from pathlib import Path

ROWS, FILES = 82_561, 43
PROMPT_POINTS = ((0.0, 8), (0.5, 53), (0.9, 117), (0.99, 289), (1.0, 900))
ANSWER_POINTS = ((0.0, 2), (0.5, 99), (0.9, 536), (0.99, 1078), (1.0, 3000))

CHINESE = (
    "春天来了，花园里的桃花开了",
    "请把下面的句子改写得更简短一些",
    "他每天早上七点钟骑自行车去图书馆",
    "一杯热茶和一块面包就是很好的早餐",
    "水在零度结冰，在一百度沸腾",
    "我们先量一量桌子的长度，再决定买哪一块布",
    "小猫在窗台上睡觉，阳光照在它身上",
    "把面粉、鸡蛋和牛奶放进碗里搅拌均匀",
    "这座桥有三百年的历史，至今仍然很坚固",
    "学习一门新的语言需要耐心和练习",
    "火车八点二十分从北站出发，十点半到达",
    "如果明天下雨，我们就在家里看书",
    "请列出三种常见的水果，并说明它们的颜色",
    "圆的面积等于半径的平方乘以圆周率",
    "夏天的夜晚，孩子们在院子里数星星",
    "写一首关于大海的短诗，语气要平静",
)
ENGLISH = (
    "The train leaves the northern station at twenty past eight",
    "Please rewrite the following sentence in simpler words",
    "Water freezes at zero degrees and boils at one hundred",
    "A cup of tea and a slice of bread make a good breakfast",
    "Name three common fruits and describe their colours",
    "The bridge is three hundred years old and still strong",
    "Learning a new language takes patience and practice",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "If it rains tomorrow, we will stay at home and read",
    "Mix the flour, the eggs and the milk in a large bowl",
)


def write_corpus(folder: Path, rows: int = ROWS, files: int = FILES, seed: int = 4) -> int:
    """Write the corpus as indented JSON arrays; one row in 1000 is broken by unescaped quotes in one file of four.

    Args:
        folder: where to; `zh` and `en` are made in it.
        rows, files: size of the corpus.
        seed: of the random numbers; the same seed gives the same bytes.

    Returns:
        How many of the rows are whole.
    """
    dice = random.Random(seed)
    whole = 0
    for number in range(files):
        chinese = number % 2 == 0
        share = rows // files + (number < rows % files)
        texts = [_row(dice, chinese) for _ in range(share)]
        place = folder / ("zh" if chinese else "en") / f"rows-{number:02}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False, indent=4) for row in texts]
        broken = range(0, share, 1000) if number % 4 == 3 else ()
        for each in broken:
            lines[each] = lines[each].replace('"output": "', '"output": "He said "well" and went. ', 1)
        whole += share - len(broken)
        place.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")
    return whole


def _row(dice: random.Random, chinese: bool) -> dict[str, str]:
    pool, joint = (CHINESE, "。") if chinese else (ENGLISH, ". ")
    length = _length(dice, PROMPT_POINTS)
    no_input = dice.random() < 0.6
    return {
        "instruction": _text(dice, pool, joint, length if no_input else length // 2),
        "input": ("无输入" if chinese else "") if no_input else _text(dice, pool, joint, length - length // 2),
        "output": _text(dice, pool, joint, _length(dice, ANSWER_POINTS)),
    }


def _length(dice: random.Random, points: tuple[tuple[float, int], ...]) -> int:
    """A number of characters from the distribution with these points, straight lines between them."""
    at = dice.random()
    for (low, shorter), (high, longer) in pairwise(points):
        if at <= high:
            return round(shorter + (longer - shorter) * (at - low) / (high - low))
    return points[-1][1]


def _text(dice: random.Random, pool: tuple[str, ...], joint: str, length: int) -> str:
    text = ""
    while len(text) < length:
        text += dice.choice(pool) + joint
    return text[:length].strip() or pool[0]
