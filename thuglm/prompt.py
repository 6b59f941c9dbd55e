"""How a conversation becomes the text of one prompt, and how an answer is tidied: the published rules.

no history      query

with history    [Round 0]
                问：first question
                答：first answer
                [Round 1]
                问：query
                答：                 <- the model goes on from here
"""

import re
from collections.abc import Sequence


def chat_prompt(query: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """The published chat prompt for `query` after `history`, a sequence of (question, answer)."""
    if not history:
        return query
    rounds = [f"[Round {i}]\n问：{question}\n答：{answer}\n" for i, (question, answer) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


def process_response(response: str) -> str:
    """Trim an answer and give back the full-width punctuation that the tokenizer's NFKC normalisation took from
    Chinese text: an ASCII `, ! : ; ?` that touches a Chinese character becomes `，！：；？`."""
    response = response.strip().replace("[[训练时间]]", "2023年")
    for ascii_mark, full_width in zip(",!:;?", "，！：；？", strict=True):
        mark = re.escape(ascii_mark)
        response = re.sub(rf"([\u4e00-\u9fff]){mark}", rf"\1{full_width}", response)
        response = re.sub(rf"{mark}([\u4e00-\u9fff])", rf"{full_width}\1", response)
    return response
