"""Sizes of the model and settings of a run: the two inputs of every formula in `step_memory` and `step_time`.

    Shape    what the model is      layers, hidden, heads, inner, vocab        from the config
    Setting  what is done with it   batch, length, micro-batches, LoRA, dtype  from the reader

Both are small frozen records, so that results can be cached on them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, isqrt
from typing import Any

from glmhelpers.utils.units import shown

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

LORA_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""Linear layers of one block, in the order in which a token meets them; the names that peft matches."""

MOST = 10**9
"""Largest batch, length, rank ... that is taken for meant: products of a few of them stay within a float's range."""

MOST_LAYERS = 1000

GRAPH_TOKENS = 2048
"""Tokens of a micro-batch up to which CUDA graphs are worth their memory: with more, no host is slower than its GPU."""

BYTES_PER_WEIGHT = {16: 2.0, 32: 4.0, 8: 1.0, 4: 0.5}


@dataclass(frozen=True)
class Shape:
    """Sizes of a ChatGLM model.

    Attributes:
        layers: number of blocks.
        hidden: width of the hidden states.
        heads: attention heads in a block.
        inner: width inside the MLP.
        vocab: rows of the embedding and of the head.
        max_length: longest sequence that the rotary tables cover, in tokens.
    """

    layers: int
    hidden: int
    heads: int
    inner: int
    vocab: int
    max_length: int

    @classmethod
    def of(cls, config: "Shape | Mapping[str, Any] | Any") -> "Shape":
        """Sizes from a ChatGLMConfig, a dict with the published keys, or a Shape.

        Raises:
            ValueError: a key is missing, or is not a positive whole number.
        """
        if isinstance(config, cls):
            return config
        known = config if isinstance(config, Mapping) else vars(config)
        keys = ("num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "vocab_size")
        sizes: list[Any] = [known[key] if key in known else getattr(config, key, None) for key in keys]
        sizes.append(known.get("max_sequence_length", 2048))
        for key, size in zip((*keys, "max_sequence_length"), sizes, strict=True):
            most = MOST_LAYERS if key == "num_layers" else MOST
            if not _is_whole(size, 1, most):
                raise ValueError(f"config.{key} is {shown(size)}; a whole number from 1 to {most} is needed")
        return cls(*sizes)

    def linear(self, name: str) -> tuple[int, int]:
        """(inputs, outputs) of one of the four linear layers of a block."""
        width = self.hidden
        return {
            "query_key_value": (width, 3 * width),
            "dense": (width, width),
            "dense_h_to_4h": (width, self.inner),
            "dense_4h_to_h": (self.inner, width),
        }[name]

    @cached_property
    def matrix_parameters(self) -> int:
        """Weights in the four matrices of one block (no biases)."""
        return sum(i * o for i, o in map(self.linear, LORA_TARGETS))

    @cached_property
    def block_parameters(self) -> int:
        """All parameters of one block: four matrices, their biases, two LayerNorms (201,379,840 in the 6B model)."""
        return self.matrix_parameters + sum(self.linear(name)[1] for name in LORA_TARGETS) + 4 * self.hidden

    @cached_property
    def head_parameters(self) -> int:
        """Parameters of the head, and of the embedding: vocabulary times width."""
        return self.vocab * self.hidden


@dataclass(frozen=True)
class Setting:
    """One way to run the model; checked when it is made.

    Attributes:
        batch_size: rows in one optimizer step.
        seq_length: tokens in a row (the prompt's, when not training).
        micro_batches: parts into which the batch is cut; it must divide it.
        lora_rank: rank r of the adapter, 0 for none.
        lora_targets: which linear layers of each block carry an adapter; one name is one of them.
        lora_dropout: dropout before the adapter; 0 keeps no mask.
        lora_fused: the adapter computes as in `glmhelpers.lora.layer` (a 16-bit base), not as in peft.
        dtype: of base weights and activations; adapters are float32 always.
        base_bits: bits a weight of the four frozen matrices: 16 (32 with float32), 8 or 4.
        loss_chunk: token positions whose logits exist at the same time.
        label_share: part of the token positions that carry a label, 0 to 1; the others never become logits.
        training: False for generation with a key-value cache.
        kv_length: tokens in the cache at the end of generation; at least seq_length.
        prefix_length: keys of a learnt prefix (P-tuning v2) in front of every row, 0 for none; instead of LoRA.
        prefix_projection: width of the network that the prefix comes out of, 0 for none.
        cuda_graphs: short micro-batches are recorded once and replayed, see `devicemap.captured`.
        in_flight: micro-batches in memory at a time, see `training.pipeline`; None for all of them.
    """

    batch_size: int = 4
    seq_length: int = 1024
    micro_batches: int = 1
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ("query_key_value",)
    lora_dropout: float = 0.1
    lora_fused: bool = True
    dtype: str = "float16"
    base_bits: int = 16
    loss_chunk: int = 512
    label_share: float = 1.0
    training: bool = True
    kv_length: int = 0
    prefix_length: int = 0
    prefix_projection: int = 0
    cuda_graphs: bool = False
    in_flight: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be run, in words.

        Raises:
            ValueError: a value is out of range; the message names it.
        """
        object.__setattr__(self, "lora_targets", as_targets(self.lora_targets))
        least = dict.fromkeys(("batch_size", "seq_length", "micro_batches", "loss_chunk"), 1)
        none = dict.fromkeys(("lora_rank", "kv_length", "prefix_length", "prefix_projection"), 0)
        for name, low in (least | none).items():
            if not _is_whole(value := getattr(self, name), low, MOST):
                raise ValueError(f"{name} is {shown(value)}; it must be a whole number from {low} to {MOST:,}")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"a batch of {self.batch_size} rows cannot be cut into {self.micro_batches} equal micro-batches; "
                f"choose one of {divisors(self.batch_size)}"
            )
        if self.in_flight is not None and not _is_whole(self.in_flight, 1, self.micro_batches):
            raise ValueError(
                f"in_flight is {shown(self.in_flight)}; it must be a whole number from 1 to {self.micro_batches}, the "
                "number of micro-batches, or None for all of them"
            )
        if self.prefix_length and self.lora_rank:
            raise ValueError(
                f"prefix_length is {self.prefix_length} and lora_rank {self.lora_rank}: one of them is trained; set "
                "the other to 0"
            )
        unknown = [name for name in self.lora_targets if name not in LORA_TARGETS]
        if unknown:
            raise ValueError(f"unknown LoRA target {unknown[0]!r}; choose from {', '.join(LORA_TARGETS)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; choose from {', '.join(DTYPE_BYTES)}")
        if self.base_bits not in BYTES_PER_WEIGHT:
            raise ValueError(f"base_bits is {self.base_bits}; choose 16, 8 or 4")
        if not 0 <= self.label_share <= 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"label_share is {self.label_share!r}, lora_dropout {self.lora_dropout!r}: parts of one, 0 to 1"
            )

    @property
    def element(self) -> int:
        """Bytes of one activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Rows in one micro-batch."""
        return self.batch_size // self.micro_batches

    @property
    def tokens(self) -> int:
        """Tokens in one micro-batch."""
        return self.rows * self.seq_length

    @property
    def keys(self) -> int:
        """Keys that a token can see: those of the prefix and of its row."""
        return self.prefix_length + self.seq_length

    @cached_property
    def recorded(self) -> "Setting | None":
        """The largest micro-batches that are CUDA graphs: these, padded, or shorter ones; None if there are none."""
        longest = GRAPH_TOKENS // self.rows // 16 * 16
        if not (self.cuda_graphs and self.training and longest) or self.prefix_length or self.base_bits < 16:
            return None
        length = padded_length(self.seq_length)
        return replace(self, seq_length=length if length * self.rows <= GRAPH_TOKENS else longest)

    @cached_property
    def replayed(self) -> bool:
        """Are the longest micro-batches themselves replayed?"""
        return self.recorded is not None and padded_length(self.seq_length) * self.rows <= GRAPH_TOKENS

    @cached_property
    def flying(self) -> int:
        """Micro-batches in memory at a time; all of them if they share a prefix or are replayed."""
        together = self.in_flight is None or self.prefix_length or self.replayed
        return self.micro_batches if together else self.in_flight or 0

    @property
    def waves(self) -> bool:
        """Are some micro-batches undone before others begin?"""
        return self.flying < self.micro_batches

    @property
    def for_step(self) -> dict[str, Any]:
        """What `run_step` has to be told of these settings, by its names: how the batch is cut and what is alive."""
        return {name: getattr(self, name) for name in ("micro_batches", "in_flight", "loss_chunk")}

    def lanes(self, gpus_used: int) -> int:
        """Streams that a step works in on each GPU: several, if not all micro-batches are in flight on several GPUs."""
        return self.flying if self.waves and gpus_used > 1 else 1

    @property
    def fused(self) -> bool:
        """Is the fused LoRA layer in use? 8- and 4-bit layers keep peft's."""
        return self.lora_fused and self.base_bits >= 16

    @property
    def adapters(self) -> tuple[str, ...]:
        """Linear layers that carry an adapter; empty when the rank is 0."""
        return self.lora_targets if self.lora_rank else ()


def with_prefix(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with the prefix of a configuration that has one (`pre_seq_len`); with a prefix there is no LoRA,
    unless the settings say so."""
    known = config if isinstance(config, Mapping) else vars(config)
    found = dict(settings)
    if length := known.get("pre_seq_len"):
        found = {"prefix_length": length, **found}
        if known.get("prefix_projection"):
            found = {"prefix_projection": known["hidden_size"], **found}
    return {"lora_rank": 0, **found} if found.get("prefix_length") else found


def prefix_bytes(shape: Shape, setting: Setting) -> int:
    """What a prefix trains, in float32: keys and values of all blocks, P * 2 * layers * hidden; or the network that
    makes them, P * hidden, hidden to its middle, and from there to 2 * layers * hidden. Beside block 0."""
    length, middle, out = setting.prefix_length, setting.prefix_projection, 2 * shape.layers * shape.hidden
    if not middle or not length:
        return 4 * length * out
    return 4 * (length * shape.hidden + (shape.hidden + 1) * middle + (middle + 1) * out)


def cast_bytes(shape: Shape, setting: Setting) -> int:
    """Keys and values of one block's prefix in the base's dtype; a checkpointed block keeps them as its input."""
    return 2 * setting.prefix_length * shape.hidden * setting.element if setting.element == 2 else 0


def mask_bytes(setting: Setting) -> int:
    """Additive mask of one micro-batch, rows * length * keys (each row padded to 8), shared by all heads.

    Every micro-batch keeps its own until its backward pass is over.
    """
    padded = ceil(setting.keys / 8) * 8
    return setting.rows * setting.seq_length * padded * setting.element


def table_bytes(shape: Shape, setting: Setting) -> int:
    """cos and sin of one micro-batch: each rows * length * head width / 2."""
    return setting.tokens * shape.hidden // shape.heads * setting.element


def hidden_bytes(shape: Shape, setting: Setting) -> int:
    """Hidden states of one micro-batch: rows * length * hidden. The unit U of the other terms."""
    return setting.tokens * shape.hidden * setting.element


def padded_length(length: int) -> int:
    """The length that rows are padded to: multiples of 16 up to 192 tokens, of 32 up to 320, of 128 beyond."""
    step = 16 if length <= 192 else 32 if length <= 320 else 128
    return -(-length // step) * step


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def as_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """LoRA targets from one name or several."""
    return (targets,) if isinstance(targets, str) else tuple(targets)


def divisors(number: int) -> list[int]:
    """All whole numbers that divide `number`, ascending: the possible numbers of micro-batches of a batch."""
    small = [part for part in range(1, isqrt(number) + 1) if number % part == 0]
    return small + [number // part for part in reversed(small) if part * part != number]
