"""P-tuning v2 (Liu et al., 2021, https://arxiv.org/abs/2110.07602), as the authors of ChatGLM published it.

Nothing of the model is trained. Every block gets keys and values in front of those of the text, which nobody wrote and
everybody sees; they alone are learnt:

    embedding [P, layers * 2 * H]      or, with prefix_projection:  embedding [P, H] ─► Linear ─► tanh ─► Linear
       │
       └─► block 0: key, value [P, H]   block 1: key, value   ...

                 keys   p0  p1  p2 │  a   b  [gM] <s>  x          positions of the text: as without a prefix
            a           #   #   #  │  #   #   #   .   .
            x           #   #   #  │  #   #   #   #   #

peft's PREFIX_TUNING is the same, kept outside the model: its keys come as the argument `prefix` of forward, or in a
cache, see `taken_from`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from thuglm.configuration_chatglm import ChatGLMConfig

Prefix = Sequence[tuple[Tensor, Tensor]]
"""Key and value of each block, [B or 1, heads, P, head_dim]."""

DROPOUT = 0.1  # the published number; no configuration has it


class PrefixEncoder(nn.Module):
    """Keys and values of a learnt prefix; parameters named as in the checkpoints of the authors' `ptuning` folder."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.shape = (config.num_layers * 2, config.num_attention_heads, config.head_dim)
        length, width, out = config.pre_seq_len, config.hidden_size, config.num_layers * 2 * config.hidden_size
        assert length is not None  # who has no prefix makes no encoder
        self.embedding = nn.Embedding(length, width if config.prefix_projection else out)
        if config.prefix_projection:
            self.trans = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, batch: int, dtype: torch.dtype) -> Prefix:
        """Key and value of each block for `batch` rows, on the device of this module."""
        flat = self.embedding.weight
        flat = self.trans(flat) if hasattr(self, "trans") else flat
        return split_prefix(self.dropout(flat.to(dtype).expand(batch, -1, -1)), self.shape)


def split_prefix(flat: Tensor, shape: tuple[int, int, int]) -> Prefix:
    """[B or 1, P, layers * 2 * H], as every program keeps it -> key and value of each block; views of it.

    `shape`: (layers * 2, heads, head_dim).

    One `unbind`, so that the gradients of all blocks are put together once.
    """
    parts = [part.transpose(1, 2) for part in flat.unflatten(-1, shape).unbind(2)]
    return list(zip(parts[::2], parts[1::2], strict=True))


def taken_from(cache: Cache) -> Prefix | None:
    """Keys and values of a cache, to be used without being added to; None unless it is a filled DynamicCache.

    So a learnt prefix can be trained through blocks that are run again for the backward pass, which would fill a cache
    twice.
    """
    if type(cache) is not DynamicCache or not cache.get_seq_length():
        return None
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
