"""The configuration of ChatGLM-6B: the published keys, with the published values as defaults.

    ChatGLMConfig()                      the released 6.2-billion-parameter model (v1.1)
    ChatGLMConfig.from_pretrained(dir)   whatever `config.json` in `dir` says

      vocab_size 130528 ──► word_embeddings ─► 28 x block(hidden 4096, heads 32, inner 16384) ─► lm_head
                            └───────────────────────── tied: one matrix, used twice ─────────────────┘

The first release (v1.0) shuffled the vocabulary and carried 20,000 image tokens. Its files load without an error into
newer code and then talk nonsense, so they are recognised here and refused.
"""

import json
import os
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from thuglm.constants import MAX_LENGTH

V1_0_VOCAB_SIZE = 150528
V1_0_FIRST_SPECIAL_ID = 150000
IS_PACKED = (
    "a packed release (chatglm-6b-int4 or -int8), which is not read here; the full weights are packed while they are "
    "loaded, with load_quantized(folder, bits=4)"
)


def is_v1_0(vocab_size: int | None, bos_token_id: int | None = None) -> bool:
    """Whether these sizes are those of the first release."""
    return vocab_size == V1_0_VOCAB_SIZE or (bos_token_id or 0) >= V1_0_FIRST_SPECIAL_ID


def _check_file(path: Path) -> None:
    """Refuse a config.json that is none: transformers says of it no more than that, or that an int is not iterable."""
    advice = f"fetch it again (notebook 01), or ask verify_weights({str(path.parent)!r}) for the command that mends it"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: {advice}")
    text = path.read_bytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"no whole JSON ({error})" if text.strip() else f"empty ({len(text)} bytes)"
        raise OSError(f"{path} is {what}: {advice}") from None
    if not isinstance(found, dict):
        raise OSError(f"{path} holds {str(found)[:40]!r} and no settings: {advice}")


@strict
class ChatGLMConfig(PreTrainedConfig):
    """Shape and special ids of a ChatGLM (first generation) model.

    Args:
        vocab_size: rows of the embedding (and of `lm_head`), padding rows included.
        hidden_size: width H of the residual stream.
        num_layers: number of blocks. It does not change the residual scale, see `modeling_chatglm.ALPHA`.
        num_attention_heads: heads per block; `hidden_size / num_attention_heads` must be a multiple of 4, since the two
            rotary halves each rotate pairs.
        inner_hidden_size: width of the MLP.
        layernorm_epsilon: epsilon of every LayerNorm.
        max_sequence_length: longest sequence (prompt and answer, in tokens) the model was trained for.
        bos_token_id, eos_token_id: `<sop>`, start of the answer, and `<eop>`, its end (several ids end it as well;
            None: only the length does).
        mask_token_id, gmask_token_id: `[MASK]` and `[gMASK]`, the hole that the answer fills.
        pad_token_id: `<pad>`.
        pre_seq_len: keys of a learnt prefix in front of every text, see `prefix_encoder`; None: there is no prefix.
        prefix_projection: the prefix comes out of a small network.

    Raises:
        ValueError: for a v1.0 or a packed configuration, a head size that cannot be rotated, 1-D positions, or an empty
            prefix.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - transformers' own class-level convention
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = MAX_LENGTH
    position_encoding_2d: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pad_token_id: int | None = 3
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if is_v1_0(self.vocab_size, self.bos_token_id):
            raise ValueError(
                f"This is the config.json of ChatGLM-6B v1.0 (vocab_size {self.vocab_size}, bos_token_id "
                f"{self.bos_token_id}): its ids and weights do not fit this code. Download v1.1 (vocab_size 130528, "
                "bos_token_id 130004), all files from the same revision: see notebook 01."
            )
        if bits := kwargs.get("quantization_bit"):
            raise ValueError(f"config.json says quantization_bit {bits}: {IS_PACKED}.")
        if not self.position_encoding_2d:
            raise ValueError("position_encoding_2d is false: only the published 2-D positions are implemented.")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} must be a whole "
                "multiple of 4: half of a head rotates with each of the two positions, and each half in pairs."
            )
        if self.pre_seq_len is not None and self.pre_seq_len < 1:
            raise ValueError(f"pre_seq_len is {self.pre_seq_len}: a prefix has 1 key or more; leave it out for none.")
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, with ~ in a path written out.

        Raises:
            FileNotFoundError: there is no config.json in the folder; with the defaults it would be another model.
            OSError: it is no JSON object (the kind of error that transformers has for it).
        """
        name = os.path.expanduser(pretrained_model_name_or_path)
        if os.path.isdir(name):
            _check_file(Path(name, kwargs.get("subfolder") or "", kwargs.get("_configuration_file") or "config.json"))
        return super().get_config_dict(name, **kwargs)

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end an answer."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return frozenset(token for token in ids if token is not None)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)

__all__ = ["ChatGLMConfig"]
