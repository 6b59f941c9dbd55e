"""Which tensor of the published checkpoint lies in which file, known without the files.

    word_embeddings | block 0 | block 1 | ... | block 27 | final_layernorm | lm_head
    |----- 1 -----------|------ 2 ------|-- 3 --| ...           7 ----------|-- 8 ---|

`save_pretrained` fills a shard in the order of the state dict, and begins the next one when a tensor would not fit into
2 GB. The cuts were made for v1.0, whose embedding and head had 150,528 rows; v1.1 has 130,528 and kept the cuts. That
is why shard 1 has 1.74 GB and not 2.0, and why the published index claims 327,680,000 bytes too many. LayerNorms are
stored as float32, everything else as float16.

Nobody published this list. It follows from the published sizes, and the tests check it: the sum is the total_size of
the index to the byte, and each file is larger than its tensors by its directory only, some 300 bytes for each tensor.
"""

from math import prod
from typing import Any

from glmhelpers.weights.consistency import EMBEDDING
from thuglm.configuration_chatglm import V1_0_VOCAB_SIZE

SHARD_LIMIT = 2 * 10**9
PUBLISHED_VOCAB_SIZE = 130528
STALE_TOTAL = 13_744_473_856
"""`total_size` of the published index: the bytes of v1.0."""
HEAD = "lm_head.weight"


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored tensor, in the published order, `inv_freq` and the head included.

    Args:
        config: a ChatGLMConfig.
    """
    width, inner = config.hidden_size, config.inner_hidden_size
    block = {
        "input_layernorm.weight": (width,),
        "input_layernorm.bias": (width,),
        "attention.rotary_emb.inv_freq": (width // config.num_attention_heads // 4,),
        "attention.query_key_value.weight": (3 * width, width),
        "attention.query_key_value.bias": (3 * width,),
        "attention.dense.weight": (width, width),
        "attention.dense.bias": (width,),
        "post_attention_layernorm.weight": (width,),
        "post_attention_layernorm.bias": (width,),
        "mlp.dense_h_to_4h.weight": (inner, width),
        "mlp.dense_h_to_4h.bias": (inner,),
        "mlp.dense_4h_to_h.weight": (width, inner),
        "mlp.dense_4h_to_h.bias": (width,),
    }
    shapes = {EMBEDDING: (config.vocab_size, width)}
    for number in range(config.num_layers):
        shapes |= {f"transformer.layers.{number}.{name}": shape for name, shape in block.items()}
    final = "transformer.final_layernorm"
    return shapes | {f"{final}.weight": (width,), f"{final}.bias": (width,), HEAD: (config.vocab_size, width)}


def stored_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in the published files."""
    return prod(shape) * (4 if "layernorm" in name else 2)


def published_shards(config: Any) -> list[dict[str, tuple[int, ...]]]:
    """One name -> shape for each shard: the eight of ChatGLM-6B; other sizes are cut in the same proportion.

    Args:
        config: a ChatGLMConfig.
    """
    shapes = tensor_shapes(config)
    counted = {name: stored_bytes(name, shape) for name, shape in shapes.items()}
    for name in (EMBEDDING, HEAD):
        counted[name] = counted[name] * V1_0_VOCAB_SIZE // PUBLISHED_VOCAB_SIZE
    limit = SHARD_LIMIT * sum(counted.values()) / STALE_TOTAL
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in counted.items():
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shapes[name]
        filled += size
    return shards


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, as a device map names it."""
    pieces = name.split(".")
    return ".".join(pieces[:3] if pieces[1] == "layers" else pieces[:-1])


def part_bytes(config: Any) -> dict[str, int]:
    """Part -> bytes of its parameters when it is loaded in float16, in the order of the forward pass.

    Args:
        config: a ChatGLMConfig.
    """
    found: dict[str, int] = {}
    for name, shape in tensor_shapes(config).items():
        if not name.endswith("inv_freq"):
            found[part_of(name)] = found.get(part_of(name), 0) + 2 * prod(shape)
    return found
