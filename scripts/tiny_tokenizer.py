"""Train ice_text.model: a small sentencepiece model with the layout of ChatGLM-6B's.

    id  0     1    2     3      4    5 ...              N ...
       <unk> <s>  </s>  <pad>  <n>  learned pieces     appended pieces, in the released order:
                                                       [MASK] [gMASK] [sMASK] <unused_0> <sop> <eop> <ENC> <dBLOCK>
                                                       <|tab|>  <|blank_2|> .. <|blank_80|>
                                                       <0x00> .. <0xFF>  (unknown characters become their UTF-8 bytes)

In the released file N is 130000, here it is LEARNED.
"""

import io
import re
import string
import struct
from collections.abc import Iterable

import sentencepiece as spm

LEARNED = 1200
# Chinese is written without spaces, and a few hundred rows repeat whole phrases: left alone, sentencepiece would
# learn "澳大利亚的首都是" as one piece. No piece crosses one of these small words.
SMALL_WORDS = "的是吗了加减和与把从里个几哪谁请你您我他她叫有在又还下一这那后前"
BREAK = "¦"  # not in any row, and left alone by the normaliser
CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6  # piece types of sentencepiece_model.proto
CONTROL_PIECES = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
USER_DEFINED_PIECES = ["<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]


def train_sentencepiece(texts: Iterable[str]) -> bytes:
    """Return a serialized sentencepiece model of LEARNED + 344 pieces for these texts.

    Digits are pieces of their own, so 17 is read as 1 7 and sums can be worked out digit by digit.
    """
    buffer = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([mark_breaks(text.replace("\n", "<n>")) for text in texts]),
        pretokenization_delimiter=BREAK,
        model_writer=buffer,
        model_type="unigram",
        vocab_size=LEARNED,
        character_coverage=1.0,
        # Everything that can be typed on an English keyboard, and what the chat template adds.
        required_chars=string.ascii_letters + string.digits + string.punctuation + "问答",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["<n>"],
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentencepiece_length=12,
        num_threads=1,
        minloglevel=2,
    )
    return append_released_pieces(buffer.getvalue())


def mark_breaks(text: str) -> str:
    """Put BREAK around small words, and between the leading blank and a Chinese character."""
    return re.sub(f"([{SMALL_WORDS}])", rf"{BREAK}\1{BREAK}", re.sub(r"^(?=[\u4e00-\u9fff])", BREAK, text))


def append_released_pieces(serialized: bytes) -> bytes:
    """Append the 344 special pieces that ChatGLM's file has after the learned ones, with the same types.

    A protocol buffer is a list of (tag, value); gluing two messages together merges them: pieces are added to
    the list, and the one field of the second trainer_spec is set in the first. No protobuf package is needed.
    """
    special = [(name, CONTROL) for name in CONTROL_PIECES]
    special += [(name, USER_DEFINED) for name in USER_DEFINED_PIECES]
    special += [(name, BYTE) for name in BYTE_PIECES]
    pieces = b"".join(field(1, piece_message(name, kind)) for name, kind in special)
    byte_fallback = varint(35 << 3) + varint(1)
    return serialized + pieces + field(2, byte_fallback)


def insert_unused_pieces(serialized: bytes, at: int, until: int) -> bytes:
    """Put pieces that no text is ever cut into before piece `at`, which becomes piece `until`.

    Args:
        serialized: a sentencepiece model.
        at: number of pieces that keep their ids.
        until: the new id of the next one.
    """
    place = 0
    for _ in range(at):
        place = end_of_field(serialized, place)
    unused = (field(1, piece_message(f"<grown_{number}>", UNUSED)) for number in range(at, until))
    return serialized[:place] + b"".join(unused) + serialized[place:]


def end_of_field(message: bytes, place: int) -> int:
    """Where the piece that begins at `place` ends.

    Raises:
        ValueError: there is no piece at `place`.
    """
    if message[place : place + 1] != varint(1 << 3 | 2):
        raise ValueError(f"byte {place} of the sentencepiece model does not begin a piece: it has fewer than expected")
    length, shift, place = 0, 0, place + 1
    while message[place] > 127:
        length, shift, place = length | (message[place] & 127) << shift, shift + 7, place + 1
    return place + 1 + (length | message[place] << shift)


def piece_message(name: str, kind: int) -> bytes:
    """ModelProto.SentencePiece: 1 = piece (string), 2 = score (float), 3 = type (enum)."""
    return field(1, name.encode()) + varint(2 << 3 | 5) + struct.pack("<f", 0.0) + varint(3 << 3) + varint(kind)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field: tag, length, payload."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    """A number in groups of 7 bits, lowest first; the high bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
