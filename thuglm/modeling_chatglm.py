"""ChatGLM-6B (2023), the first General Language Model that many people could run, native to transformers 5.

GLM fills a hole. The prompt is read in both directions; the hole, `[gMASK]`, stands at its end; the answer that fills
it starts at `<sop>` and is written from left to right. One transformer does both, told apart by its mask and positions
alone: both are drawn in `prefix_mask`.

A block is neither pre-norm nor post-norm: the *normalised* tensor runs along the residual stream, enlarged:

            x ──► LN ──► a ──┬──► attention ──► + ──► LN ──► b ──┬──► MLP ──► + ──►
                             └── ALPHA * a ─────┘                └── ALPHA * b ─┘

Equal to the original in every case of tests/reference; three things there surprise everybody who ports this model:
ALPHA does not follow `num_layers`, the rotary frequencies are rounded to float16 in every dtype, and the stored
`inv_freq` and `lm_head` tensors of the checkpoint are ignored.
"""

import contextlib
import difflib
import inspect
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from thuglm.chunked_loss import DEFAULT_CHUNK, IGNORE_INDEX, called_cross_entropy, chunked_cross_entropy, is_matrix
from thuglm.configuration_chatglm import ChatGLMConfig
from thuglm.prefix_encoder import Prefix, PrefixEncoder, taken_from
from thuglm.prefix_mask import (
    check_input_ids,
    check_position_ids,
    continued_positions,
    has_prompts,
    ids_of,
    make_position_ids,
    make_visible,
    positions_before,
    visible_of,
)
from thuglm.prompt import as_turns, chat_prompt, check_text, process_response

# The original passes no num_layers to its blocks: each keeps the default 28, whatever the depth of the model.
ALPHA = (2 * 28) ** 0.5

# The published score of a masked pair, before the softmax. Finite, so that a row that sees nothing (left padding)
# gives a harmless average and not NaN; far enough that exp() of it is 0 in float32 beside any visible score.
MASKED_SCORE = -10000.0


# transformers calls the key-value cache `past_key_values`, from 5.24 on `cache`: in what forward returns, and in what
# generate hands to the next step. A name that generate does not know would be dropped without a word.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The key-value cache, under whichever of its two names it was given.

    Raises:
        ValueError: two different caches were given.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, and differ here: give one of them.")
    return cache if past_key_values is None else past_key_values


def wants_dict(return_dict: bool | None, config: ChatGLMConfig) -> bool:
    """Whether forward returns a dictionary, and not a tuple: what was asked, or what the configuration says."""
    return getattr(config, "return_dict", True) if return_dict is None else return_dict


class ChatGLMRotaryEmbedding(nn.Module):
    """cos and sin of the angles position * frequency, for both position rows."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.width = config.head_dim // 2
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        """1 / 10000^(2i / width), [head_dim / 4], rounded to float16 as the original does in every dtype."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32, device="cpu") / self.width
        return (1.0 / 10000**exponents).half().float()

    def _apply(self, fn, recurse=True):
        # No file holds the frequencies: after `to_empty` they would be whatever lay in that memory.
        before = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq is not before and not self.inv_freq.is_meta:
            self.inv_freq = self.frequencies().to(self.inv_freq)
        return self

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, 2, L] -> cos and sin, each [B, L, 1, 1, 2, head_dim / 4], ready to broadcast over heads and over q, k.

        Angles are rounded to `dtype` before cos and sin are taken, as in the original.
        """
        angles = position_ids.transpose(1, 2).unsqueeze(-1).to(dtype) * self.inv_freq.to(dtype)
        angles = angles[:, :, None, None]
        return angles.cos(), angles.sin()


class _SplitAndRotate(torch.autograd.Function):
    """[B, L, 3H] as `query_key_value` writes it -> query, key, value, each [B, L, heads, head_dim], rotated.

    Query and key are rotated where they lie, so nothing is copied and only cos and sin are kept for the backward pass:
    the gradient of a rotation is the rotation by the opposite angle. In-place is safe because nobody else needs the
    memory: a linear layer does not save its output.
    """

    @staticmethod
    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., head_dim] -> the quarters that rotate together, each [..., 2, head_dim / 4]."""
        first, second = x.view(*x.shape[:-1], 2, 2, x.shape[-1] // 4).unbind(-2)
        return first, second

    @staticmethod
    def split_and_rotate_(mixed: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """The forward pass, for when nothing needs a gradient."""
        batch, length, width = mixed.shape
        mixed = mixed.view(batch, length, heads, 3, width // (3 * heads))
        first, second = _SplitAndRotate.pairs(mixed[:, :, :, :2])
        rest = first * sin
        first.mul_(cos).addcmul_(second, sin, value=-1)
        torch.addcmul(rest, second, cos, out=second)
        query, key, value = mixed.unbind(3)
        return query, key, value

    @staticmethod
    def not_in_place(mixed: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same from operations that torch.export and torch.compile can follow."""
        batch, length, width = mixed.shape
        mixed = mixed.view(batch, length, heads, 3, width // (3 * heads))
        first, second = _SplitAndRotate.pairs(mixed[:, :, :, :2])
        rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-2).flatten(-3)
        query, key = rotated.unbind(3)
        return query, key, mixed[:, :, :, 2]

    @staticmethod
    def forward(ctx, mixed: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _SplitAndRotate.split_and_rotate_(mixed, cos, sin, heads)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = (x.squeeze(3) for x in ctx.saved_tensors)
        batch, length, heads, head_dim = grads[0].shape
        mixed = grads[0].new_empty(batch, length, heads, 3, head_dim)
        for part, grad in enumerate(grads[:2]):
            first, second = _SplitAndRotate.pairs(grad)
            to_first, to_second = _SplitAndRotate.pairs(mixed[..., part, :])
            torch.mul(first, cos, out=to_first).addcmul_(second, sin)
            torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=-1)
        mixed[..., 2, :] = grads[2]
        return mixed.flatten(-3), None, None, None


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, layer: int
) -> tuple[Tensor, Tensor]:
    """Attention as the original writes it out: slow, but it shows its weights.

    `query`, `key`, `value`, and the first result: [B, heads, L, head_dim]; the weights: [B, heads, L, L].
    Scores are divided by (layer + 1) until they are in float32, so that float16 does not overflow.
    """
    scale = float(layer + 1)
    scores = (query / (query.shape[-1] ** 0.5 * scale)) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores.masked_fill(bias < 0, MASKED_SCORE)
    weights = F.softmax(scores.float() * scale, dim=-1).to(value.dtype)
    return weights @ value, weights


class ChatGLMAttention(nn.Module):
    """Self-attention; query, key and value come from one matrix, head by head: [q0 k0 v0 q1 k1 v1 ...]."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        prefix_key: Tensor | None = None,
        prefix_value: Tensor | None = None,
        past_key_values=None,
        output_attentions: bool = False,
    ):
        """[B, L, H] -> [B, L, H], and the attention weights if they were asked for.

        A prefix, [B or 1, heads, P, head_dim], stands in front of the other keys and values.
        """
        batch, length, hidden = hidden_states.shape
        mixed = self.query_key_value(hidden_states)
        split: Callable = _SplitAndRotate.apply if torch.is_grad_enabled() else _SplitAndRotate.split_and_rotate_
        if torch.compiler.is_compiling():
            split = _SplitAndRotate.not_in_place
        query, key, value = (x.transpose(1, 2) for x in split(mixed, cos, sin, self.heads))
        if prefix_key is not None and prefix_value is not None:
            before = (part.expand(batch, -1, -1, -1) for part in (prefix_key, prefix_value))
            key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if output_attentions or self.config._attn_implementation == "eager":
            context, weights = eager_attention(query, key, value, bias, self.layer_idx)
        else:
            context, weights = F.scaled_dot_product_attention(query, key, value, attn_mask=bias), None
        return self.dense(context.transpose(1, 2).reshape(batch, length, hidden)), weights


class ChatGLMMLP(nn.Module):
    """H -> inner -> H with the tanh form of GELU."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, H] -> [B, L, H]."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """One block, as drawn in the module's docstring."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        prefix_key: Tensor | None = None,
        prefix_value: Tensor | None = None,
        past_key_values=None,
        output_attentions: bool = False,
    ):
        """[B, L, H] -> [B, L, H], and the attention weights if they were asked for."""
        normed = self.input_layernorm(hidden_states)
        attended, weights = self.attention(
            normed, bias, cos, sin, prefix_key, prefix_value, past_key_values, output_attentions
        )
        normed = self.post_attention_layernorm(attended.add(normed, alpha=ALPHA))
        return self.mlp(normed).add(normed, alpha=ALPHA), weights


NO_OFFLOAD = (
    'Offload is not supported: put whole parts on GPUs or on "cpu", which computes too (plan_device_map finds a map).'
)


def refuse_offloaded(*modules: nn.Module) -> None:
    """Refuse modules whose weights accelerate brings only for their own call: the model looks at them before.

    Raises:
        RuntimeError: names the remedy.
    """
    if any(hasattr(module, "_hf_hook") and module.weight.device.type == "meta" for module in modules):
        raise RuntimeError(f"accelerate has taken weights of this model away, to disk or CPU. {NO_OFFLOAD}")


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What the two models below share: names, loading, placement."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _tied_before: dict[str, str] | None = None  # what was tied before `place` made a copy of the head
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012 - transformers' own class-level convention
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    # The published shards store each block's rotary frequencies; the original ignores them, and so do we.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for names of its own functions in this file; each layer asks the configuration.
        return True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ChatGLMRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; `device_map` may name "cpu", which then computes too (nothing is copied back and forth).

        Of a model with a learnt prefix (`pre_seq_len`) all else is frozen, as in the published code.

        See `PreTrainedModel.from_pretrained`.
        """
        if args and isinstance(args[0], str | os.PathLike):
            args = (os.path.expanduser(args[0]), *args[1:])
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "transformer.layers.0" in device_map:
            # Maps are made for the model without a prefix; a name that a model does not have is passed over.
            kwargs["device_map"] = {"transformer.prefix_encoder": device_map["transformer.layers.0"], **device_map}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The following device_map keys .*: \['transformer\.prefix_encoder'\]")
            model = super().from_pretrained(*args, **kwargs)
        loaded = model[0] if isinstance(model, tuple) else model
        if loaded.config.pre_seq_len is not None:
            loaded.requires_grad_(False)
            loaded.base_model.prefix_encoder.requires_grad_(True)
        elif hasattr(loaded, "hf_device_map"):
            loaded.hf_device_map.pop("transformer.prefix_encoder", None)
        if len(set(getattr(loaded, "hf_device_map", {}).values())) > 1:
            loaded.place(loaded.hf_device_map)
        return model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Here a map is whole, also one that transformers made, and no weight has been read.
        if any(str(device) == "disk" for device in (load_config.device_map or {}).values()):
            raise ValueError(f'device_map sends a part of the model to "disk". {NO_OFFLOAD}')
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def place(self, device_map: dict[str, int | str | torch.device]):
        """Put each module where `device_map` says, and keep the map as `hf_device_map`.

        The forward pass moves the hidden states itself, once per change of device, so accelerate's hooks (which would
        look at every argument of every module, and copy modules on the CPU to a GPU for each use) are taken off.

        If the embedding and `lm_head` are sent to different devices, they can no longer be one tensor: `lm_head` gets
        its own copy (1.07 GB for ChatGLM-6B). Sent to one device again, they are one tensor again, if both are frozen
        and still equal: what was trained, or given to one of them on purpose, stays its own.

        Args:
            device_map: module name -> device, as for `from_pretrained`.

        Raises:
            KeyError: a name that is no module of this model.
        """
        remove_hook_from_module(self, recurse=True)
        modules = dict(self.named_modules())
        # The longest name wins, as everywhere.
        for name, device in sorted(device_map.items(), key=lambda item: len(item[0])):
            if name not in modules:
                raise KeyError(
                    f"device_map names {name!r}, which this model does not have; its parts are "
                    "transformer.word_embeddings, transformer.layers.0 ..., transformer.final_layernorm and lm_head."
                )
            if name != "lm_head":
                modules[name].to(device)
        head, embedding = self.get_output_embeddings(), self.get_input_embeddings()
        if head is not None and "lm_head" in device_map:
            device = torch.device(device_map["lm_head"])
            inner = getattr(head, "base_layer", head)  # with an adapter of peft around it
            if torch.empty(0, device=device).device == embedding.weight.device:
                # None: never tied. A model that was tied by hand has an empty list, and was tied as well.
                if self._tied_before is not None and _same_frozen(inner.weight, cast(Tensor, embedding.weight)):
                    inner.weight = embedding.weight
                    self.config.tie_word_embeddings, self.all_tied_weights_keys = True, self._tied_before
                    self._tied_before = None
                head.to(device)
            else:
                if inner.weight is embedding.weight:
                    inner.weight = nn.Parameter(embedding.weight.detach().to(device), bool(inner.weight.requires_grad))
                    self._tied_before = self.all_tied_weights_keys
                self.config.tie_word_embeddings = False
                self.all_tied_weights_keys = {}
                head.to(device)
        self.hf_device_map = dict(device_map)
        return self


def _same_frozen(head: Tensor, embedding: Tensor) -> bool:
    """Is nothing lost if the embedding takes the place of the head? They may be on different devices."""
    if head.requires_grad or embedding.requires_grad or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    # In pieces: there may be no room for both matrices on one GPU. On "meta" there are no values to lose.
    pairs = zip(head.split(8192), embedding.split(8192), strict=True)
    nothing = head.is_meta or embedding.is_meta
    return nothing or all(torch.equal(mine.to(theirs.device), theirs) for mine, theirs in pairs)


IGNORED_KEYWORDS = frozenset(
    {"assistant_tokenizer", "cache_position", "is_first_iteration", "token_type_ids", "tokenizer"}
)
"""What transformers and peft hand to every model's forward and this one has no use for."""


def refuse_unknown(keywords: dict[str, Any], forward: Callable) -> None:
    """A misspelt keyword would train or answer without what it asks for.

    Raises:
        TypeError: a keyword with a value that `forward` does not know; its nearest names are given.
    """
    for name in sorted(name for name, value in keywords.items() if value is not None and name not in IGNORED_KEYWORDS):
        known = [known for known in inspect.signature(forward).parameters if known not in ("self", "kwargs")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
        raise TypeError(f"forward got the keyword {name!r}, which this model does not know: {hint}")


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, blocks and the final LayerNorm."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = ChatGLMRotaryEmbedding(config)
        self.layers = nn.ModuleList(ChatGLMBlock(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.pre_seq_len is not None:
            self.requires_grad_(False)
            self.prefix_encoder = PrefixEncoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.word_embeddings = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        all_ids: Tensor | None = None,
        prompt_positions: Tensor | None = None,
        prefix: Prefix | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the blocks. Nothing in here waits for a GPU.

        Args:
            input_ids: [B, L]. With an empty cache each row holds a prompt up to its `<sop>`, and perhaps an answer.
            attention_mask: [B, L] (with a cache [B, past + L]), 1 = real token; None: no padding. A 4-D mask
                [B, 1, L, past + L] says itself who sees whom, see `visible_of`.
            position_ids: [B, 2, L]; derived from the ids if not given. A step of an answer needs them, or `all_ids`.
            inputs_embeds: [B, L, H], looked up beforehand. Without `input_ids` they hold the rows of `[gMASK]` and
                `<sop>` unchanged, by which mask and positions are found; looking for them waits for a GPU. What stands
                before the first of `all_ids` (a learnt prompt) has the places before 0.
            cache: another name of `past_key_values`, the one that transformers uses from 5.24 on.
            return_dict: False: a tuple of what is there, in the same order.
            all_ids: [B, T], prompt and answer so far, of which `input_ids` are the last: mask and positions are derived
                from them. What the cache holds beyond them (a learnt prefix, see `prefix_encoder`; a text that many
                prompts share) stands before the prompt, and everybody sees it. By default, `input_ids` that start with
                a prompt are all ids.
            prompt_positions: [B, 2, P], positions of the first P of `all_ids`, if they are not the derived ones.
            prefix: keys and values in front of the prompt, for each block; in any dtype, on any device.

        Returns:
            `.last_hidden_state` [B, L, H]; `.hidden_states`, if asked for: the embeddings, the output of each block but
            the last, and `last_hidden_state`; `.attentions`, if asked for: written out as with
            `attn_implementation="eager"`.

        Raises:
            TypeError: a keyword that nobody knows.
            ValueError: see `check_input_ids`; also for a sequence beyond `max_sequence_length`, and for a prefix beside
                a cache that holds something.
        """
        refuse_unknown(kwargs, ChatGLMModel.forward)
        # A block may stand for one of another process, and have no parts.
        norms = (getattr(block, "input_layernorm", block) for block in self.layers)
        refuse_offloaded(self.word_embeddings, *norms, self.final_layernorm)
        config = self.config
        past_key_values = one_cache(past_key_values, cache)
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if position_ids is not None:
            check_position_ids(position_ids)
        table = self.word_embeddings
        if input_ids is None:
            if inputs_embeds is None:
                raise ValueError("forward needs input_ids [B, L]; or inputs_embeds [B, L, H].")
            input_ids = ids_of(inputs_embeds, table.weight, config) if all_ids is None else all_ids
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            what = type(input_ids).__name__
            if isinstance(input_ids, Tensor):
                what = f"{str(input_ids.dtype).removeprefix('torch.')} {list(input_ids.shape)}"
            raise ValueError(
                f"input_ids are {what}; expected a tensor of whole numbers, [B, L]: "
                'tokenizer([text], return_tensors="pt") makes it'
            )
        new = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        first = isinstance(past, int) and past == 0
        if prefix and not first:
            raise ValueError("prefix goes in front of a prompt: the cache holds one already, with its prefix, if any.")
        if past_key_values is not None and not use_cache and (found := taken_from(past_key_values)):
            prefix, past_key_values = found, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        # Ids that are a prompt by themselves, behind keys of something else: those keys stand before it.
        if all_ids is None and position_ids is None and not first and has_prompts(input_ids, config):
            all_ids = input_ids
        length = past + new if all_ids is None else all_ids.shape[1]
        if isinstance(length, int) and length > config.max_sequence_length:
            raise ValueError(
                f"The sequence has {length} tokens, this model was trained for max_sequence_length="
                f"{config.max_sequence_length}. Shorten the prompt or the history, or ask for fewer new tokens."
            )
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            whole = first or all_ids is input_ids
            check_input_ids(input_ids, config, prompt=whole, mask_token=position_ids is None)
        if position_ids is None:
            if all_ids is None and not first:
                raise ValueError(
                    "past_key_values holds a prompt, so position_ids [B, 2, L] must be given, or all_ids [B, T], the "
                    "ids of prompt and answer so far: positions cannot be derived from the new ids alone. "
                    "model.generate() does this by itself."
                )
            position_ids = self._positions(input_ids if all_ids is None else all_ids, attention_mask, prompt_positions)
            position_ids = positions_before(position_ids[..., -new:], new)

        if inputs_embeds is None:
            inputs_embeds = table(input_ids.to(table.weight.device))
        device = self._device_of(0, inputs_embeds)
        hidden_states = inputs_embeds.to(device)
        if first and not prefix and config.pre_seq_len is not None:
            prefix = self.prefix_encoder(len(input_ids), hidden_states.dtype)
        added = prefix[0][0].shape[2] if prefix else 0
        past = added if first and prefix else past
        kv_length = added + new if past_key_values is None else past_key_values.get_mask_sizes(added + new, 0)[0]
        visible = self._visible(
            new,
            input_ids if all_ids is None else all_ids,
            attention_mask,
            past,
            kv_length,
            device,
            all_ids is None and not first,
        )
        bias = None
        if visible is not None:
            bias = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=device)
            bias.masked_fill_(~visible, MASKED_SCORE)
        cos, sin = self.rotary_emb.to(device)(position_ids.to(device), hidden_states.dtype)
        on_first: tuple[Tensor | None, ...] = (bias, cos, sin)
        on_device = {device: on_first}

        all_hidden_states, all_attentions = [], []
        # Fewer blocks than there are: transformers' early exit says so in the configuration, for its first guesses.
        for layer, block in enumerate(self.layers[: config.num_layers]):
            device = self._device_of(layer, hidden_states)
            if device not in on_device:
                on_device[device] = tuple(None if x is None else x.to(device) for x in on_first)
            hidden_states = hidden_states.to(device)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            before = (part.to(device, hidden_states.dtype) for part in prefix[layer]) if prefix else ()
            more = {"output_attentions": True} if output_attentions else {}
            hidden_states, weights = block(
                hidden_states, *on_device[device], *before, past_key_values=past_key_values, **more
            )
            all_attentions.append(weights)
        norm = self.final_layernorm
        hidden_states = norm(hidden_states.to(getattr(norm, "weight", hidden_states).device))
        outputs = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: past_key_values},
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return outputs if wants_dict(return_dict, config) else outputs.to_tuple()

    def _device_of(self, layer: int, default: Tensor) -> torch.device:
        # A stage of a pipeline has only some of the blocks; what stands for the others holds no weights.
        norm = getattr(self.layers[layer], "input_layernorm", None) if len(self.layers) else None
        return default.device if norm is None else norm.weight.device

    def _positions(self, all_ids: Tensor, mask: Tensor | None, prompt_positions: Tensor | None) -> Tensor:
        if prompt_positions is not None:
            return continued_positions(prompt_positions, all_ids.shape[1])
        mask = None if mask is None or mask.dim() == 4 else mask[:, -all_ids.shape[1] :]
        return make_position_ids(all_ids, self.config, mask)

    def _visible(
        self,
        new: int,
        ids: Tensor,
        mask: Tensor | None,
        past: int | Tensor,
        kv_length: int,
        device: torch.device,
        answer_only: bool,
    ) -> Tensor | None:
        """Bool [B or 1, 1, new, kv_length], True = visible, or None if everything is."""
        mask = None if mask is None else mask.to(device)
        if mask is not None and mask.dim() == 4:
            visible = visible_of(mask)
            return F.pad(visible, (0, kv_length - visible.shape[-1]), value=False)
        if new == 1 and mask is None and isinstance(past, int) and past and kv_length == past + new:
            return None
        if mask is not None and self.config.pre_seq_len is not None and mask.shape[1] == ids.shape[1]:
            mask = F.pad(mask, (self.config.pre_seq_len, 0), value=1)  # the cache may not say how much it holds
        before = past + new - ids.shape[1]
        return make_visible(
            ids.to(device), self.config, mask, new=new, before=before, keys=kv_length, answer_only=answer_only
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout for the length of a `with` block; afterwards every part is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class _IdStreamer(BaseStreamer):
    """Hands each new token to another thread; the first `put` of `generate` is the prompt, which is skipped."""

    def __init__(self):
        self.queue: queue.Queue = queue.Queue()
        self.seen_prompt = False

    def put(self, value: Tensor) -> None:
        if self.seen_prompt:
            self.queue.put(value.reshape(-1).tolist())
        self.seen_prompt = True

    def end(self) -> None:
        self.queue.put(None)


class _StopWhen(StoppingCriteria):
    """Stops all rows once `asked` is set."""

    def __init__(self, asked: threading.Event):
        self.asked = asked

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device, dtype=torch.bool)


class _RefuseNaN(LogitsProcessor):
    """The original turns NaN logits into the token with id 5, again and again; an error is kinder."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores).any(dim=-1).all() or torch.isnan(scores).any():
            raise FloatingPointError(
                f"The logits of token {input_ids.shape[1]} are NaN or all infinite. Usual causes: damaged weights (run"
                " verify_weights), an adapter whose training diverged, or float16 overflow (try dtype=torch.float32)."
            )
        return scores


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM with its language-model head, tied to the embedding after `from_pretrained`, as in the original."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.transformer.word_embeddings = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        """As in transformers, but the embedding always wins: the `lm_head.weight` of a file is ignored, as originally.

        transformers would leave the two untied if their values differ.

        Raises:
            ValueError: neither was in the files.
        """
        embedding = self.get_input_embeddings()
        stored = missing_keys is None or "transformer.word_embeddings.weight" not in missing_keys
        # transformers may name one of the two alone, and leave the other without memory.
        if missing_keys and "lm_head.weight" in missing_keys and (not stored or embedding.weight.is_meta):
            raise ValueError(
                "The checkpoint has no transformer.word_embeddings.weight (and no lm_head.weight, which is the same "
                "matrix): a shard is missing, or it holds an adapter alone. Download it again, or load the base first."
            )
        if self.config.tie_word_embeddings and stored:
            self.lm_head.weight = embedding.weight
        super().tie_weights(missing_keys, recompute_mapping)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        target_rows: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_chunk: int = DEFAULT_CHUNK,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        all_ids: Tensor | None = None,
        prompt_positions: Tensor | None = None,
        prefix: Prefix | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss if `labels` are given. See `ChatGLMModel.forward` for the arguments not listed.

        Args:
            labels: [B, L], the ids themselves, -100 where no token is to be learnt; the shift by one happens here
                (`shift_labels`, as in transformers, are shifted already and count instead).
            logits_to_keep: compute the logits of the last so many positions only; 0 means all. Or their indices, [n].
            return_logits: by default logits are returned unless a loss is computed in training mode.
            target_rows: [N] int64, the flat indices `row * (L - 1) + position` of the labelled targets
                `labels[:, 1:]`. Known to whoever made the labels on the CPU; with it rows without label cost nothing.
                Without it they are found here if `labels` is on the CPU, and otherwise computed for nothing, since
                finding them would wait for the GPU.
            num_items_in_batch: labels in the whole (accumulated) batch; the loss is the sum divided by it. By default
                the number of labels here, so that the loss is their mean.
            loss_chunk: rows of logits alive at once, see `chunked_loss`.

        Returns:
            `.loss`: float32 scalar on the device of `labels` (of `input_ids`, if the labels are on the CPU); `.logits`:
            [B, L, V] on the last device, or None; `.past_key_values`, `.hidden_states`, `.attentions`. Labels that
            lie where `lm_head` does cost no copy between GPUs, and such a copy makes both of them wait.
        """
        # Not an argument by name: the Trainer takes all whose name has "label" in it for columns of the data.
        shift_labels = kwargs.pop("shift_labels", None)
        refuse_unknown(kwargs, ChatGLMForConditionalGeneration.forward)
        if labels is not None and position_ids is None and all_ids is None:
            all_ids = input_ids  # a row with labels is whole; looking for its prompt would wait for the GPU
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            all_ids=all_ids,
            prompt_positions=prompt_positions,
            prefix=prefix,
            return_dict=True,
        )
        refuse_offloaded(self.lm_head)
        hidden = outputs.last_hidden_state.to(self.lm_head.weight.device)
        if return_logits is None:
            return_logits = labels is None or not self.training
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.to(hidden.device)
        logits = self.lm_head(hidden[:, kept]) if return_logits else None
        loss = None
        if labels is not None:
            given = inputs_embeds if input_ids is None else input_ids
            home = cast(Tensor, given).device if labels.device.type == "cpu" else labels.device
            if (wanted := labels if shift_labels is None else shift_labels).shape != hidden.shape[:2]:
                raise ValueError(
                    f"labels have shape {list(wanted.shape)}; one for each token: {list(hidden.shape[:2])}"
                )
            rows, targets = (hidden[:, :-1], labels[:, 1:]) if shift_labels is None else (hidden, shift_labels)
            loss = self._loss(rows, targets, target_rows, num_items_in_batch, loss_chunk).to(home)
        answer = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return answer if wants_dict(return_dict, self.config) else answer.to_tuple()

    def _loss(self, rows, targets, target_rows, num_items_in_batch, chunk) -> Tensor:
        targets, rows = targets.reshape(-1), rows.reshape(-1, rows.shape[-1])
        if target_rows is None and targets.device.type == "cpu" and not torch.compiler.is_compiling():
            target_rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
            if target_rows.numel() == 0:
                raise ValueError(
                    "No row of this batch has a label: every entry of labels[:, 1:] is -100. Were the answers cut off "
                    "by a length limit, or the prompt masked twice?"
                )
        if target_rows is not None:
            targets = targets.index_select(0, target_rows.to(targets.device))
            rows = rows.index_select(0, target_rows.to(rows.device))
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORE_INDEX).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(rows.device)
        targets, head = targets.to(rows.device), self.lm_head
        if is_matrix(head) and not torch.compiler.is_compiling():
            total = chunked_cross_entropy(rows, head.weight, targets, chunk)
        else:
            total = called_cross_entropy(rows, head, targets, chunk)
        return total / num_items_in_batch

    # Generation ------------------------------------------------------------------------------------------------------

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        """Leave the 2-D mask as it is: transformers would make a causal one for a static cache, wrong for a prompt."""
        return attention_mask

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> None:
        """No positions: each step derives its own from all ids. transformers would extend them, or cut them off, along
        the wrong dimension: 3-D ones are multimodal for it."""
        ids = inputs_tensor if inputs_tensor.dim() == 2 else model_kwargs.get("input_ids")
        if ids is None or not ids.shape[1]:
            raise ValueError(
                "generate with inputs_embeds alone: every step derives mask and positions from the ids, so give "
                "input_ids beside them."
            )
        check_input_ids(ids, self.config)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                "guidance_scale compares with an answer to no prompt, and this model learns from its prompt where the "
                "answer starts: leave it out."
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size cuts the prompt, in which every token sees every other: leave it out, and let the "
                "model read the prompt in one pass."
            )
        # peft lends its own method to the model while it generates.
        learnt = getattr(getattr(self.prepare_inputs_for_generation, "__self__", None), "active_peft_config", None)
        guessed = "ASSISTED" in str(generation_mode).upper()
        if getattr(learnt, "is_prompt_learning", False) and (guessed or generation_config.cache_implementation):
            raise ValueError(
                "peft puts a learnt prefix or prompt into the cache of plain generation alone: leave out "
                "cache_implementation, assistants and prompt_lookup_num_tokens."
            )
        room = max_cache_length + (self.config.pre_seq_len or 0)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, room)

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args, position_ids: Tensor | None = None, **kwargs):
        parent: Any = super()
        input_ids, model_kwargs = parent._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if position_ids is not None:
            check_position_ids(position_ids)
            model_kwargs["prompt_positions"] = position_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_positions: Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """The arguments of one forward pass: as in transformers, and all ids so far, [B, T]."""
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(
            input_ids, next_sequence_length, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        # peft looks for the cache under this name, to put a learnt prefix into it.
        inputs["past_key_values"] = inputs.pop(CACHE_NAME, None)
        return {**inputs, "all_ids": input_ids, "prompt_positions": prompt_positions}

    # The published model was run with a transformers whose beam search divides a score by the length of prompt *and*
    # answer; now it is the answer alone, which picks other answers. A prompt of length 0 gives the old rule back.

    def _update_finished_beams(self, *args, **kwargs):
        return super()._update_finished_beams(*args, **{**kwargs, "decoder_prompt_len": 0})

    def _check_early_stop_heuristic(self, *args, **kwargs):
        return super()._check_early_stop_heuristic(*args, **{**kwargs, "decoder_prompt_len": 0})

    def _chat_inputs(self, tokenizer, query: str, turns: list[tuple[str, str]], settings: dict) -> dict:
        """The arguments of `generate` for one turn, with the published sampling settings where none are given."""
        prompt = chat_prompt(query, turns)
        for number, turn in enumerate(turns):
            check_text("".join(turn), f"turn {number} of the history")
        check_text(query, "the query")
        if settings.get("num_return_sequences") not in (None, 1):
            raise ValueError("num_return_sequences: a turn has one answer; chat with the same history several times.")
        settings = {"do_sample": True, "top_p": 0.7, "temperature": 0.95, "num_beams": 1, **settings}
        if "max_new_tokens" not in settings:
            settings.setdefault("max_length", self.config.max_sequence_length)
        if not settings["do_sample"]:
            settings = {k: v for k, v in settings.items() if k not in ("top_p", "temperature", "top_k")}
        processors = LogitsProcessorList([*(settings.pop("logits_processor", None) or []), _RefuseNaN()])
        inputs = tokenizer([prompt], return_tensors="pt").to(self.device)
        return {**inputs, **settings, "logits_processor": processors}

    @torch.no_grad()
    def chat(self, tokenizer, query: str, history: list | None = None, **settings):
        """Answer `query`; returns (answer, history with this turn).

        Args:
            history: earlier (question, answer) turns, or role/content messages, see `as_turns`.
            settings: any argument of `generate`; published defaults: `do_sample=True, top_p=0.7, temperature=0.95,
                max_length=2048`.

        Raises:
            TypeError: the query is no text.
            ValueError: query or history holds half a character (see `check_text`), or the history cannot be read.
        """
        turns = as_turns(() if history is None else history)
        inputs = self._chat_inputs(tokenizer, query, turns, settings)
        with evaluating(self):
            output = self.generate(**inputs)
        output = getattr(output, "sequences", output)[0, inputs["input_ids"].shape[1] :]
        response = process_response(tokenizer.decode(output.tolist()))
        return response, [*turns, (query, response)]

    def stream_chat(self, tokenizer, query: str, history: list | None = None, **settings) -> Iterator[tuple[str, list]]:
        """Like `chat`, but yields (answer so far, history with it) after each token.

        As in the published code the very last token is never yielded: it is `<eop>`, or the one that reached the length
        limit. Leaving the loop early stops the model.
        """
        turns = as_turns(() if history is None else history)
        inputs = self._chat_inputs(tokenizer, query, turns, {**settings, "num_beams": 1})
        streamer, leave, failed = _IdStreamer(), threading.Event(), []
        criteria = StoppingCriteriaList([*(inputs.pop("stopping_criteria", None) or []), _StopWhen(leave)])

        def work():
            try:
                with evaluating(self):
                    self.generate(**inputs, streamer=streamer, stopping_criteria=criteria)
            except BaseException as error:  # handed to the reader's thread
                failed.append(error)
                streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        ids: list[int] = []
        try:
            token = streamer.queue.get()
            while token is not None and (following := streamer.queue.get()) is not None:
                ids += token
                response = process_response(tokenizer.decode(ids))
                yield response, [*turns, (query, response)]
                token = following
        finally:
            leave.set()
            worker.join()
        if failed:
            raise failed[0]

    process_response: Callable[[str], str] = staticmethod(process_response)


# The published repository maps AutoModel to the whole model, so that `AutoModel...chat()` works: so does this one.
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)

__all__ = ["ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMPreTrainedModel"]
