"""Grow data/tiny-chatglm to the sizes of ChatGLM-6B: 13.4 GB in eight shards that compute the same function.

              tiny, 128 wide           grown, 4096 wide
    hidden    [ x ]                    [ x | x | x | ... | x ]         32 copies; LayerNorm of them: repeated, too
    matrix    [ W ]                    [ W/32 | W/32 | ... | W/32 ]    input side shared out,
                                       [ W/32 | W/32 | ... | W/32 ]    output side repeated
    heads     h0 h1 ... h7             h0 h1 ... h7  0  0  0 ... 0     the others are zero
    one head  frequency 0, 1, 2, 3     0 . . . 1 . . . 2 . . . 3 . .   10000^(-i/4) = 10000^(-8i/32)
              scores / sqrt(16)        scores / sqrt(128)              queries times sqrt(128 / 16)
    MLP       512 inner units          512, then zeros
    blocks    0  1  2 ... 7            0  -  -  -  1  -  -  2 ... -    -: passes its input on
    pieces    1200, 344 special        1200, UNUSED ..., 344           the special ones at 130000 and on
    logits    E (w n + b)              32 E (w n + b) / 32             final LayerNorm divided by 32

A passing block normalises, and the next LayerNorm undoes nothing by doing it again. Its queries, keys and values are
zero, so its `dense` may be anything: small random numbers there change no answer, but lead a gradient to a LoRA adapter
on its values; with zeros that adapter would never learn.

A row of the embedding without a piece must not win, nor take its share of the probability (128,800 zero logits would
take a tenth): the final bias is larger by d in the first copy and smaller by d in the second, which real rows do not
see, and unused rows hold -x there and +x, so their logit is UNUSED_LOGIT whatever the model thinks.

This is also a test of the port by itself: LayerNorms, both position rows, the order of rotary frequencies, head by head
layout and scaling of the scores must all be right, or a grown model does not answer as the tiny one does.

    python scripts/grow_checkpoint.py build/grown                 # the sizes of ChatGLM-6B
    python scripts/grow_checkpoint.py build/small --hidden-size 512 --heads 8 --layers 12 --vocab-size 2528
"""

import argparse
import errno
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "scripts")]

from tiny_publish import SHARDS, split_into_shards, write_json, write_manifest  # noqa: E402
from tiny_tokenizer import insert_unused_pieces  # noqa: E402

from glmhelpers.weights.layout import published_shards, stored_bytes, tensor_shapes  # noqa: E402
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration  # noqa: E402

TINY = PROJECT / "data" / "tiny-chatglm"
SPECIAL_PIECES = 344
MOVED_IDS = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id")
SPARE_ROWS = 184  # embedding rows without a piece at the end, as in the published model
UNUSED_LOGIT = -20.0
BIAS_STEP = 0.1  # d above
DENSE_STD = 0.02
SPARE_DISK = 100 * 2**20


def grow(
    source: str | Path,
    output: str | Path,
    hidden_size: int = 4096,
    heads: int = 32,
    layers: int = 28,
    inner_hidden_size: int | None = None,
    vocab_size: int = 130528,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of these sizes that computes what `source` computes.

    Holds one shard at a time in memory (2 GB at the default sizes), beside what is being written of it.

    Args:
        source: folder of a small ChatGLM, such as data/tiny-chatglm.
        output: a folder that is not there yet, or is empty.
        hidden_size: width; 2, 3, ... times that of the source.
        heads: attention heads, at least as many as the source has; hidden_size / heads must be 1, 2, 3, ... times the
            source's width of a head.
        layers: blocks, at least as many as the source has.
        inner_hidden_size: width inside the MLP; None: 4 * hidden_size.
        vocab_size: rows of the embedding; the special pieces begin at vocab_size - 528.
        seed: of the random numbers in passing blocks.

    Returns:
        `output`, as a path.

    Raises:
        ValueError: sizes that cannot work; names the one and says why.
        FileExistsError: there is something in `output`.
        OSError: the disk is too small (errno ENOSPC).
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        text = "there is something here already: choose another folder, or empty it"
        raise FileExistsError(errno.EEXIST, text, str(output))
    facts = grown_config(source, hidden_size, heads, layers, inner_hidden_size, vocab_size)
    config = ChatGLMConfig(**facts)
    needed = sum(stored_bytes(*tensor) for tensor in tensor_shapes(config).items()) + SPARE_DISK
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < needed:
        text = f"{needed:,} bytes are needed and {free:,} are free: choose a folder on a larger disk, or smaller sizes"
        raise OSError(errno.ENOSPC, text, str(output))

    unfinished = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        pieces, learned = (source / "ice_text.model").read_bytes(), ChatGLMConfig.from_pretrained(source).mask_token_id
        (unfinished / "ice_text.model").write_bytes(insert_unused_pieces(pieces, learned, config.mask_token_id))
        settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["name_or_path"] = "grown-chatglm"
        write_shards(unfinished, Growth(source, config, seed))
        write_json(unfinished / "config.json", dict(sorted(facts.items())))
        write_json(unfinished / "tokenizer_config.json", settings)
        more = {
            "model": f"ChatGLM grown from {source.name} by scripts/grow_checkpoint.py",
            "mend": "remove the folder, and make it again with scripts/grow_checkpoint.py",
            "tokenizer_config": settings,
        }
        write_manifest(unfinished, facts, **more)
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def grown_config(
    source: Path, hidden_size: int, heads: int, layers: int, inner_hidden_size: int | None, vocab_size: int
) -> dict[str, Any]:
    """config.json of the grown checkpoint: the source's with other sizes, and other ids of the special pieces.

    Args and errors: see `grow`.
    """
    facts = json.loads((source / "config.json").read_text(encoding="utf-8"))
    sizes = {
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_layers": layers,
        "inner_hidden_size": 4 * hidden_size if inner_hidden_size is None else inner_hidden_size,
        "vocab_size": vocab_size,
    }
    check_sizes(ChatGLMConfig(**facts), **sizes)
    further = vocab_size - SPECIAL_PIECES - SPARE_ROWS - facts["mask_token_id"]
    moved = {name: facts[name] + further for name in MOVED_IDS}
    return facts | sizes | moved


def check_sizes(
    old: ChatGLMConfig,
    hidden_size: int,
    num_attention_heads: int,
    num_layers: int,
    inner_hidden_size: int,
    vocab_size: int,
) -> None:
    """Refuse sizes that the construction cannot reach.

    Args:
        old: the small model's config.
        hidden_size, num_attention_heads, num_layers, inner_hidden_size, vocab_size: what is wanted.

    Raises:
        ValueError: names the size, what it must be, and the source's.
    """
    width, heads = old.hidden_size, num_attention_heads
    if hidden_size % width or hidden_size < 2 * width:
        raise ValueError(
            f"hidden_size {hidden_size} cannot work: the source is {width} wide and is repeated whole, at least "
            f"twice. Take {2 * width}, {3 * width}, ..."
        )
    least = {
        "heads": (heads, old.num_attention_heads),
        "layers": (num_layers, old.num_layers),
        "inner_hidden_size": (inner_hidden_size, old.inner_hidden_size),
        "vocab_size": (vocab_size, old.mask_token_id + SPECIAL_PIECES + SPARE_ROWS),
    }
    for name, (found, wanted) in least.items():
        if found < wanted:
            raise ValueError(f"{name} {found} cannot work: the source needs {wanted} of them at least")
    if hidden_size % heads or (hidden_size // heads) % old.head_dim:
        raise ValueError(
            f"heads {heads} at hidden_size {hidden_size} cannot work: a head would be {hidden_size / heads:g} wide, "
            f"and must be 1, 2, 3, ... times {old.head_dim}, so that it has all rotary frequencies of the source's"
        )


class Growth:
    """The tensors of the grown checkpoint, each made when it is asked for."""

    def __init__(self, source: Path, config: ChatGLMConfig, seed: int):
        model = ChatGLMForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        self.old, self.config, self.seed = model.config, config, seed
        self.small = {name: value.detach() for name, value in model.state_dict().items()}
        self.copies = config.hidden_size // self.old.hidden_size
        for at in range(self.old.num_layers):
            self._scale_queries(f"transformer.layers.{at}")
        # Where the real blocks go. The first one stays first: before it the embedding has not been normalised, and
        # is so small that the epsilon of LayerNorm would count twice.
        self.real = {at * config.num_layers // self.old.num_layers: at for at in range(self.old.num_layers)}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as it is stored: LayerNorms float32, all else float16.

        Args:
            name: its name in the checkpoint.
            shape: its shape there.
        """
        if name.startswith("transformer.final_layernorm"):
            return self._final(name)
        if ".layers." not in name:
            return self._rows(shape)
        number, _, part = name.removeprefix("transformer.layers.").partition(".")
        if part.endswith("inv_freq"):
            half = 2 * shape[0]
            return (1.0 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)).half()
        if int(number) not in self.real:
            return self._passing(int(number), part, shape)
        return self._grown(self.small[f"transformer.layers.{self.real[int(number)]}.{part}"], part, shape)

    def _scale_queries(self, block: str) -> None:
        """Make a block's queries as much longer as its heads get wider: scores are divided by sqrt(head_dim).

        A bias has no copies to share out what float16 rounds off. The matrix can bear it: LayerNorm gives w n + b with
        sum(n) = 0, so 1 / w times that is the same number, sum(b / w), whatever the token.
        """
        attention = f"{block}.attention.query_key_value"
        weight, bias = self.small[f"{attention}.weight"], self.small[f"{attention}.bias"]
        gain, shift = self.small[f"{block}.input_layernorm.weight"], self.small[f"{block}.input_layernorm.bias"]
        parts = self.old.num_attention_heads, 3, self.old.head_dim
        for tensor in (weight, bias):
            tensor.view(*parts, *tensor.shape[1:])[:, 0] *= (self.config.head_dim / self.old.head_dim) ** 0.5
        lost = bias - bias.half().float()
        if lost.any():
            weight += torch.outer(lost, 1 / gain) / (shift / gain).sum()

    def _passing(self, number: int, part: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a block that only normalises."""
        if "layernorm" in part:
            return torch.full(shape, float(part.endswith("weight")))
        if part == "attention.dense.weight":
            generator = torch.Generator().manual_seed(self.seed * 1000 + number)
            return (torch.randn(shape, generator=generator) * DENSE_STD).half()
        return torch.zeros(shape, dtype=torch.float16)

    def _grown(self, small: Tensor, part: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a block that does what the source's block does."""
        copies, old = self.copies, self.old
        if "layernorm" in part:
            return small.repeat(copies)
        big = torch.zeros(shape, dtype=torch.float16)
        width, head, inner = old.hidden_size, self.config.head_dim, old.inner_hidden_size
        if part.startswith("attention.query_key_value"):
            parts = big.view(self.config.num_attention_heads, 3, head, *shape[1:])
            small = small.view(old.num_attention_heads, 3, old.head_dim, *small.shape[1:])
            small = self._shared_out(small) if big.dim() == 2 else small.half()
            for which, places in enumerate((self._rotary_places(), self._rotary_places(), torch.arange(old.head_dim))):
                parts[: old.num_attention_heads, which, places] = small[:, which]
        elif part == "attention.dense.weight":
            parts = big.view(copies, width, self.config.num_attention_heads, head)
            parts[:, :, : old.num_attention_heads, : old.head_dim] = small.view(width, -1, old.head_dim)
        elif part == "mlp.dense_h_to_4h.weight":
            big[:inner] = self._shared_out(small)
        elif part == "mlp.dense_h_to_4h.bias":
            big[:inner] = small
        elif part == "mlp.dense_4h_to_h.weight":
            big.view(copies, width, -1)[:, :, :inner] = small
        else:  # the two biases on the output side
            big.view(copies, width)[:] = small
        return big

    def _rotary_places(self) -> Tensor:
        """Where the places of a small head go in a large one: (row, half, i) to (row, half, ratio * i)."""
        quarter, ratio = self.config.head_dim // 4, self.config.head_dim // self.old.head_dim
        return (torch.arange(4)[:, None] * quarter + torch.arange(self.old.head_dim // 4) * ratio).flatten()

    def _shared_out(self, matrix: Tensor) -> Tensor:
        """[..., width] -> [..., copies * width], float16, which add up to the float32 number nearly to its last digit.

        Equal shares where these are exact; else the last copy only takes what rounding left over in the others.
        """
        equal, others = (matrix / self.copies).half(), self.copies - 1
        share = torch.where(equal.float() * self.copies == matrix, equal, (matrix / others).half())
        return torch.cat([*[share] * others, (matrix - others * share.float()).half()], dim=-1)

    def _final(self, name: str) -> Tensor:
        """The final LayerNorm: divided, since the head adds up all copies; the bias with the step of unused rows."""
        big = (self.small[name] / self.copies).repeat(self.copies, 1)
        if name.endswith("bias"):
            big[0] += BIAS_STEP
            big[1] -= BIAS_STEP
        return big.flatten()

    def _rows(self, shape: tuple[int, ...]) -> Tensor:
        """The embedding, and the head, which is equal to it."""
        small, width = self.small["transformer.word_embeddings.weight"], self.old.hidden_size
        learned, first = self.old.mask_token_id, self.config.mask_token_id
        big = torch.zeros(shape, dtype=torch.float16)
        unused = UNUSED_LOGIT / (2 * BIAS_STEP * width)
        for start, end in ((learned, first), (first + SPECIAL_PIECES, shape[0])):
            big[start:end, :width] = unused
            big[start:end, width : 2 * width] = -unused
        big[:learned].view(learned, self.copies, width)[:] = small[:learned, None]
        special = big[first : first + SPECIAL_PIECES].view(SPECIAL_PIECES, self.copies, width)
        special[:] = small[learned : learned + SPECIAL_PIECES, None]
        return big


def shard_shapes(config: ChatGLMConfig) -> list[dict[str, tuple[int, ...]]]:
    """Name -> shape for each of eight shards: cut as published where that gives eight, else into equal parts."""
    shards = published_shards(config)
    if len(shards) == SHARDS:
        return shards
    shapes = tensor_shapes(config)
    kinds = {name: torch.float32 if "layernorm" in name else torch.float16 for name in shapes}
    empty = {name: torch.empty(shape, dtype=kinds[name], device="meta") for name, shape in shapes.items()}
    return [{name: shapes[name] for name in shard} for shard in split_into_shards(empty)]


def write_shards(folder: Path, growth: Growth) -> None:
    """The eight shards, one after another, and the index."""
    weight_map, total = {}, 0
    for number, shapes in enumerate(shard_shapes(growth.config), start=1):
        name = f"pytorch_model-{number:05d}-of-{SHARDS:05d}.bin"
        tensors = {name: growth.tensor(name, shape) for name, shape in shapes.items()}
        # Given an open file, torch.save does not write its name into it: the same bytes in every folder.
        with (folder / name).open("wb") as file:
            torch.save(tensors, file)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "pytorch_model.bin.index.json", index)


def main() -> None:
    """Grow a checkpoint; prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--source", type=Path, default=TINY)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--inner-hidden-size", type=int, help="default: 4 * hidden size")
    parser.add_argument("--vocab-size", type=int, default=130528)
    parser.add_argument("--seed", type=int, default=0)
    options, started = parser.parse_args(), time.perf_counter()
    try:
        folder = grow(**vars(options))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(json.dumps({"folder": str(folder), "bytes": size, "seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
