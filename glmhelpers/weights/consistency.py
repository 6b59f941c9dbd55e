"""Do the files of a checkpoint belong together? Answered from headers, before a single weight is copied.

    config.json ---- vocab_size ------- rows of word_embeddings ---- shard 1 .. 8
         |                                                               |
         +--- special ids --- pieces of ice_text.model                   +--- index: which tensor is where
         |                         |
         +--- num_layers           +--- tokenizer_config.json: num_image_tokens

ChatGLM-6B was published twice with the same file names. In v1.0 20,000 image tokens came first, so every id of a text
token was 20,000 higher. A tokenizer of v1.0 beside weights of v1.1 gives ids of other words or of none at all.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmhelpers.utils.files import read_json
from glmhelpers.utils.folders import expanded
from glmhelpers.weights.shards import INDEX_NAMES, Entry, ShardError, list_shards, read_entries, read_index
from thuglm.configuration_chatglm import IS_PACKED, is_v1_0

EMBEDDING = "transformer.word_embeddings.weight"
V1_0_TOKENIZER_PIECES = 130000
"""The v1.0 ice_text.model lacks the 344 pieces from [MASK] on, which its tokenizer added in memory."""

SPECIAL_PIECES = {
    "bos_token_id": "<sop>",
    "eos_token_id": "<eop>",
    "mask_token_id": "[MASK]",
    "gmask_token_id": "[gMASK]",
    "pad_token_id": "<pad>",
}

LARGEST = {
    **dict.fromkeys(("vocab_size", "hidden_size", "inner_hidden_size", "max_sequence_length"), 10**7),
    **dict.fromkeys(("num_layers", "num_attention_heads"), 10**4),
}
"""Sizes in config.json, and what none reaches: a loop over 10**12 blocks would never end."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file.

    Attributes:
        file: its name.
        kind: missing, lfs_pointer, truncated, checksum or version.
        message: what was found, and the one command that mends it.
    """

    file: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def check_consistency(folder: Path, entries: dict[str, dict[str, Entry]] | None = None) -> list[Problem]:
    """Problems between the files of a checkpoint folder, of kind "version" or "missing"; empty if they fit together.

    Compares only what is there: a missing or unreadable file is the business of `verify_weights`.

    Args:
        folder: the checkpoint.
        entries: shard name -> its tensors, if the headers have been read already.
    """
    folder = expanded(folder)
    config = _read_json(folder / "config.json")
    entries = _all_entries(folder) if entries is None else entries
    if problems := _check_sizes(config):
        return problems
    problems = _check_release(config, _read_json(folder / "tokenizer_config.json"))
    problems += _check_embedding(config, entries)
    problems += _check_tokenizer(config, folder / "ice_text.model")
    problems += _check_layers(config, entries)
    problems += _check_index(folder, entries)
    return problems


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _all_entries(folder: Path) -> dict[str, dict[str, Entry]]:
    """Shard name -> its tensors, for the shards that can be read."""
    try:
        paths = list_shards(folder)
    except (FileNotFoundError, ShardError):
        paths = sorted(folder.glob("pytorch_model*.bin"))
    found = {}
    for path in paths:
        try:
            found[path.name] = read_entries(path)
        except (ShardError, OSError):
            continue
    return found


def _is_whole(value: Any, low: int, high: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_sizes(config: dict) -> list[Problem]:
    """Is every number of config.json one? And is it not a packed checkpoint?"""
    problems = []
    for key, largest in LARGEST.items():
        if key in config and not _is_whole(config[key], 1, largest):
            problems.append(f"{key} {str(config[key])[:40]!r}, where a whole number from 1 to {largest:,} belongs")
    for key in SPECIAL_PIECES:
        ids = config.get(key)
        several = ids if isinstance(ids, list) and key == "eos_token_id" else [ids]
        if ids is not None and not all(_is_whole(token, 0) for token in several):
            problems.append(f"{key} {str(ids)[:40]!r}, where the id of a token belongs")
    if config.get("quantization_bit"):
        problems.append(f"quantization_bit {str(config['quantization_bit'])[:40]}: {IS_PACKED}")
    return [Problem("config.json", "version", f"config.json says {problem}") for problem in problems]


def _check_release(config: dict, tokenizer_config: dict) -> list[Problem]:
    problems = []
    if is_v1_0(config.get("vocab_size"), config.get("bos_token_id")):
        text = (
            f"config.json is that of v1.0 (vocabulary {config.get('vocab_size')}, <sop> {config.get('bos_token_id')})"
        )
        problems.append(
            Problem("config.json", "version", f"{text}; the code and the manifest are for v1.1 (130528, 130004)")
        )
    images = tokenizer_config.get("num_image_tokens") or 0
    if images:
        text = f"tokenizer_config.json has num_image_tokens {images}: that is v1.0, v1.1 has 0"
        problems.append(Problem("tokenizer_config.json", "version", text))
    return problems


def _check_embedding(config: dict, entries: dict[str, dict[str, Entry]]) -> list[Problem]:
    for name, tensors in entries.items():
        rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None
        if rows is None:
            continue
        release = " (that is v1.0)" if is_v1_0(rows) else ""
        wanted = config.get("vocab_size", rows)
        if rows != wanted:
            text = f"{name} has an embedding of {rows} rows{release}, config.json says vocab_size {wanted}"
            return [Problem(name, "version", f"{text}: these two files are of different versions")]
        if release:
            return [Problem(name, "version", f"{name} has an embedding of {rows} rows{release}")]
    return []


def read_pieces(path: Path) -> Any:
    """The SentencePiece model of a tokenizer's file; None if it cannot be read."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        return None


def _check_tokenizer(config: dict, path: Path) -> list[Problem]:
    if (pieces := read_pieces(path)) is None:
        return []
    count, release = pieces.get_piece_size(), ""
    if count == V1_0_TOKENIZER_PIECES:
        release = " (that is v1.0)"
    if count > config.get("vocab_size", count):
        text = f"ice_text.model has {count} pieces, config.json only vocab_size {config['vocab_size']}"
        return [Problem(path.name, "version", f"{text}: tokenizer and model are of different versions")]
    for key, piece in SPECIAL_PIECES.items():
        found, wanted = pieces.piece_to_id(piece), config.get(key)
        if pieces.id_to_piece(found) != piece:
            text = f"ice_text.model has {count} pieces and none of them is {piece}{release}"
            return [Problem(path.name, "version", text)]
        if wanted is not None and found != wanted and found not in (wanted if isinstance(wanted, list) else ()):
            text = f"{piece} is {found} in ice_text.model and {wanted} in config.json ({key})"
            return [Problem(path.name, "version", f"{text}: tokenizer and model are of different versions")]
    return []


def _check_layers(config: dict, entries: dict[str, dict[str, Entry]]) -> list[Problem]:
    numbers = {
        int(match[1]): name
        for name, tensors in entries.items()
        for tensor in tensors
        if (match := re.match(r"transformer\.layers\.(\d+)\.", tensor))
    }
    depth = config.get("num_layers")
    if numbers and depth is not None and max(numbers) >= depth:
        name = numbers[max(numbers)]
        text = f"{name} holds block {max(numbers)}, config.json says num_layers {depth}"
        return [Problem(name, "version", f"{text}: these two files are of different models")]
    return []


def _check_index(folder: Path, entries: dict[str, dict[str, Entry]]) -> list[Problem]:
    path = next((folder / name for name in INDEX_NAMES if (folder / name).is_file()), None)
    if path is None:
        return []
    try:
        weight_map = read_index(path)
    except ShardError as error:
        return [Problem(path.name, "checksum", str(error))]
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            return [Problem(name, "missing", f"{name} is not there, {path.name} names it")]
    for tensor, name in weight_map.items():
        if name in entries and tensor not in entries[name]:
            text = f"{path.name} looks for {tensor} in {name}, which has no such tensor"
            return [Problem(path.name, "version", f"{text}: index and shards are of different versions")]
    for name, tensors in entries.items():
        for tensor in tensors:
            if tensor not in weight_map:
                text = f"{name} holds {tensor}, which {path.name} does not name"
                return [Problem(path.name, "version", f"{text}: index and shards are of different versions")]
    return []
