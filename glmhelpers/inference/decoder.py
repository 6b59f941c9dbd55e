"""KV cache and decoding loop: one token after another, as fast as the weights can be read; one CUDA graph a GPU.

    prompt ──► ordinary forward (prefix mask) ──► keys and values of every block, in buffers that never move
                                                                     │
       ┌────────────────── one step, replayed for each token ────────▼──────────────────────────┐
    token ──► embedding ──► blocks 0-15 ──►  copy  ──► blocks 16-27 ──► norm, head ──► logits ──► pick
       ▲      └────── graph on GPU 0 ──────┘         └────────── graph on GPU 1 ───────────┘      │
       └──────────────────────────────────────────────────────────────────────────────────────────┤
                                                       host ◄── one number a token, a step late ◄─┘

Launched one by one from Python, the some 500 small kernels of a step take longer to start than to run. A graph starts
them with one call. It repeats exactly what was recorded, so whatever changes from token to token (the token, its
position, how full the cache is) lives in tensors at fixed addresses, and the step itself counts them up.

Attention looks at the whole buffer and masks what is not filled yet; to keep that cheap, a graph sees only the first
256, 512, ... places: one graph per bucket. Parts on the CPU run without a graph; so does everything if `graphs=False`.
"""

from collections.abc import Callable, Generator
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from glmhelpers.devicemap.check import Placement, as_device
from glmhelpers.devicemap.devices import side_stream
from glmhelpers.inference.model_state import learnt_prefix
from glmhelpers.utils.types import Model
from thuglm.modeling_chatglm import MASKED_SCORE, ChatGLMRotaryEmbedding, evaluating
from thuglm.prefix_encoder import Prefix
from thuglm.prefix_mask import check_input_ids, make_position_ids

BUCKET = 256
"""Attention is computed over a multiple of so many places of the cache."""


def bucket_for(tokens: int) -> int:
    """Places of the cache that are looked at when it has to hold `tokens`: the next multiple of BUCKET."""
    return -(-tokens // BUCKET) * BUCKET


def pick(logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, noise: Tensor | None = None) -> Tensor:
    """The next token of each row, [B, V] -> [B] int64; -1 where the logits are NaN or all infinite. Does not wait.

    Sampling is the exponential race: argmax of p / e, with e drawn from Exp(1), picks a token with probability p. So
    all randomness is in `noise`, and the rest is arithmetic.

    Args:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_p: keep the likeliest tokens whose probabilities sum up to it (tokens as likely as the last one stay too).
        noise: [B, V] float32 from `exponential_()`; needed if `temperature` is not 0.
    """
    scores = logits.float()
    best, token = scores.max(dim=-1)  # NaN if any score is
    if temperature > 0:
        kept = likely(torch.softmax(scores / temperature, dim=-1), top_p)
        assert noise is not None
        token = (kept / noise).argmax(dim=-1)
    return token.where(torch.isfinite(best), -1)


def likely(probabilities: Tensor, top_p: float) -> Tensor:
    """[..., V] -> the same with 0 for every token outside the likeliest ones that together reach `top_p`."""
    if top_p >= 1:
        return probabilities
    ordered = probabilities.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    smallest = ordered.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)
    return probabilities * (probabilities >= smallest)


class FixedCache:
    """Keys and values of every block, [B, heads, capacity, head_dim] each, at addresses that stay.

    It answers what the model and its blocks ask of a cache. A prompt is written behind a learnt prefix, if any, and
    attends to both; a step writes to the place that `slot` of its device names, and attends to the first `bucket` ones.
    """

    def __init__(self, net: Model, batch: int, capacity: int):
        heads, width = net.config.num_attention_heads, net.config.head_dim
        self.capacity, self.batch = capacity, batch
        self.bucket = self.before = 0
        self.slot: dict[torch.device, Tensor] = {}
        self.keys, self.values = (
            [
                block.input_layernorm.weight.new_zeros(batch, heads, capacity, width).detach()
                for block in net.transformer.layers
            ]
            for _ in range(2)
        )

    def start(self, prefix: Prefix) -> None:
        """Zeros everywhere, or a NaN of an earlier answer would come through the mask, since NaN times 0 is NaN; then
        the prefix, from place 0 on."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()
        self.before = prefix[0][0].shape[2] if prefix else 0
        for layer, (key, value) in enumerate(prefix):
            self.keys[layer][:, :, : self.before], self.values[layer][:, :, : self.before] = key, value

    def get_seq_length(self) -> int:
        """Places in front of the prompt."""
        return self.before

    def get_mask_sizes(self, new: int, layer: int) -> tuple[int, int]:
        """(keys that a prompt of `new` tokens attends to, the first of them)."""
        return self.before + new, 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store [B, heads, new, head_dim]; returns what to attend to."""
        keys, values = self.keys[layer], self.values[layer]
        if not self.bucket:
            end = self.before + key.shape[2]
            keys[:, :, self.before : end] = key
            values[:, :, self.before : end] = value
            return keys[:, :, :end], values[:, :, :end]
        slot = self.slot[key.device]
        keys.index_copy_(2, slot, key)
        values.index_copy_(2, slot, value)
        return keys[:, :, : self.bucket], values[:, :, : self.bucket]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes on each device."""
        found: dict[str, int] = {}
        for tensor in (*self.keys, *self.values):
            found[str(tensor.device)] = found.get(str(tensor.device), 0) + tensor.nbytes
        return found


class DecodingStage:
    """Neighbouring parts of the model on one device: their counters, their fixed input, and a graph per bucket."""

    def __init__(self, net: Model, parts: list[str], device: torch.device, cache: FixedCache):
        self.net, self.parts, self.device, self.cache = net, parts, device, cache
        dtype, batch = net.transformer.final_layernorm.weight.dtype, cache.batch
        first = parts[0] == "embedding"
        shape = (batch, 1) if first else (batch, 1, net.config.hidden_size)
        self.input = torch.zeros(shape, dtype=torch.int64 if first else dtype, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, 2, 1, dtype=torch.int64, device=device)
        self.real = torch.ones(batch, cache.capacity, dtype=torch.bool, device=device)
        self.rotary = ChatGLMRotaryEmbedding(net.config).to(device)
        self.step_of_answer = torch.tensor([[0], [1]], device=device)
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def begin(self, length: int, positions: Tensor, real: Tensor) -> None:
        """Set the counters to a prompt of `length` tokens; `positions` [B, 2, 1] of its last token."""
        self.length.fill_(length)
        self.positions.copy_(positions + torch.tensor([[0], [1]]))
        self.real.fill_(True)
        self.real[:, :length] = real.to(self.device)

    def run(self) -> Tensor:
        """The step: `input` through all parts; counts up."""
        x: Tensor = self.input
        bias = cos = sin = None
        if any(part.isdigit() for part in self.parts):
            self.cache.slot[self.device] = self.length
            bucket = self.cache.bucket
            filled = torch.arange(bucket, device=self.device) <= self.length
            visible = (filled & self.real[:, :bucket])[:, None, None]
            dtype = self.net.transformer.final_layernorm.weight.dtype
            bias = torch.zeros(visible.shape, dtype=dtype, device=self.device).masked_fill_(~visible, MASKED_SCORE)
            cos, sin = self.rotary(self.positions, dtype)
        for part in self.parts:
            if part == "embedding":
                x = self.net.transformer.word_embeddings(x)
            elif part == "norm":
                x = self.net.transformer.final_layernorm(x)
            elif part == "head":
                x = self.net.lm_head(x)[:, -1]
            else:
                x, _ = self.net.transformer.layers[int(part)](x, bias, cos, sin, past_key_values=self.cache)
        self.length.add_(1)
        self.positions.add_(self.step_of_answer)
        return x

    def record(self, key: tuple) -> None:
        """Capture the step as a graph. Runs it twice before, so that libraries have set themselves up."""
        with torch.cuda.device(self.device):
            self.length.zero_()
            ours, side = torch.cuda.current_stream(), side_stream(self.device)
            side.wait_stream(ours)
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.run()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread (a notebook's monitor) may use the GPU meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                output = self.run()
            ours.wait_stream(side)
        self.graphs[key] = graph, output

    def step(self, key: tuple | None) -> Tensor:
        """One step, from the graph if there is a key; returns hidden states [B, 1, H] or logits [B, V]."""
        if key is None or self.device.type != "cuda":
            return self.run()
        graph, output = self.graphs[key]
        graph.replay()
        return output


class Decoder:
    """Generates with a fixed cache, and with CUDA graphs where there are GPUs.

    Args:
        model: a ChatGLM on its devices, or a PEFT model on top of one. Adapters may be switched on and off, merged or
            trained on between two answers: a graph that was recorded for another state is not used.
        graphs: False launches every kernel from Python.

    Raises:
        TypeError: the model is no ChatGLM.
    """

    def __init__(self, model: Model, graphs: bool = True):
        self.model = model
        self.net: Model = model.get_base_model() if isinstance(model, PeftModel) else model
        if not hasattr(self.net, "transformer") or not hasattr(self.net, "lm_head"):
            raise TypeError(f"Decoder needs a ChatGLMForConditionalGeneration, got {type(self.net).__name__}")
        self.use_graphs = graphs
        self.cache: FixedCache | None = None
        self.stages: list[DecodingStage] = []

    @property
    def recorded(self) -> int:
        """Graphs that exist now, on all GPUs."""
        return sum(len(stage.graphs) for stage in self.stages)

    def forget(self) -> None:
        """Give buffers and graphs back."""
        self.cache, self.stages = None, []

    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        pieces: int | None = None,
    ) -> Generator[list[int], None, None]:
        """Yield the ids of one new token for each row, `<eop>` included, until all rows have ended.

        The next step is on its way to the GPU before a token is handed out, so what the caller does with it costs
        nothing. Leaving the loop early is fine.

        Args:
            input_ids: [B, L] prompts up to `<sop>`, padded on the left.
            attention_mask: [B, L], 1 = real token; None: no padding.
            max_new_tokens: stop after so many.
            temperature: 0 is greedy.
            top_p: see `pick`.
            seed: the same seed gives the same answer on the same machine; None: a new one each time.
            pieces: size of the tokenizer, which knows no text for the padding rows of the embedding behind it; None:
                any id may come.

        Raises:
            ValueError: see `check_input_ids`; or prompt and answer are longer than the model's longest sequence.
            FloatingPointError: the logits are NaN or all infinite.
        """
        batch, length = input_ids.shape
        net, limit = self.net, self.net.config.max_sequence_length
        check_input_ids(input_ids.cpu(), net.config)
        if max_new_tokens < 1 or length + max_new_tokens > limit:
            raise ValueError(
                f"A prompt of {length} tokens and {max_new_tokens} new ones: at least 1 is needed, and the model was "
                f"trained for {limit} together (max_sequence_length)."
            )
        with evaluating(self.model):
            prefix = learnt_prefix(self.model)
            before = prefix[0][0].shape[2] if prefix else 0
            key = self._prepare(batch, bucket_for(before + length + max_new_tokens))
            real = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
            positions = make_position_ids(input_ids.cpu(), net.config, real)
            logits = self._read_prompt(input_ids, real, positions, prefix)
            generator = torch.Generator(logits.device)
            generator.manual_seed(seed) if seed is not None else generator.seed()
            noise = torch.empty_like(logits[:, :pieces], dtype=torch.float32) if temperature > 0 else None

            def choose(logits: Tensor) -> Callable[[], list[int]]:
                drawn = None if noise is None else noise.exponential_(generator=generator)
                token = pick(logits[:, :pieces], temperature, top_p, drawn)
                self.stages[0].input.copy_(token.clamp_min(0)[:, None], non_blocking=True)
                return fetch(token)

            ended = [False] * batch
            waiting = choose(logits)
            for number in range(max_new_tokens):
                here = waiting
                if number + 1 < max_new_tokens:
                    waiting = choose(self._step(key))
                tokens = here()
                if -1 in tokens:
                    raise FloatingPointError(
                        f"The logits of new token {number + 1} are NaN or all infinite. Usual causes: damaged weights "
                        "(run verify_weights), an adapter whose training diverged, or float16 overflow (try float32)."
                    )
                yield tokens
                ended = [done or token in net.config.ends for done, token in zip(ended, tokens, strict=True)]
                if all(ended):
                    return

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> list[list[int]]:
        """The new ids of each row, up to its `<eop>` (included); arguments as for `stream`."""
        rows: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
        for tokens in self.stream(input_ids, attention_mask, **settings):
            for row, token in zip(rows, tokens, strict=True):
                if not row or row[-1] not in self.net.config.ends:
                    row.append(token)
        return rows

    def _prepare(self, batch: int, bucket: int) -> tuple | None:
        """Buffers and graphs for this size and state of the model; returns the graphs' key, None without graphs."""
        moved = [(stage.parts, stage.device) for stage in self.stages] != stage_parts(self.net)
        if self.cache is None or self.cache.batch != batch or self.cache.capacity < bucket or moved:
            self.forget()  # the old buffers must be gone before the new ones come
            self.cache = FixedCache(self.net, batch, bucket)
            self.stages = [DecodingStage(self.net, *where, self.cache) for where in stage_parts(self.net)]
        self.cache.bucket = bucket
        if not self.use_graphs or all(stage.device.type != "cuda" for stage in self.stages):
            return None
        key = (bucket, state_of(self.net))
        for stage in self.stages:
            if stage.device.type == "cuda":
                # A graph of another state may read weights that are gone.
                stage.graphs = {old: graph for old, graph in stage.graphs.items() if old[1][0] == key[1][0]}
                if key not in stage.graphs:
                    stage.record(key)
        return key

    def _read_prompt(self, input_ids: Tensor, real: Tensor, positions: Tensor, prefix: Prefix) -> Tensor:
        """Fill the cache, set all counters; returns the logits [B, V] of the first new token."""
        net, cache = self.net, self.cache
        assert cache is not None  # made by _prepare
        bucket = cache.bucket
        cache.start(prefix)
        all_real = F.pad(real, (cache.before, 0), value=True)
        for stage in self.stages:
            stage.begin(all_real.shape[1], positions[..., -1:], all_real)
        cache.bucket = 0
        input_ids = input_ids.to(self.stages[0].device)
        hidden = net.transformer(
            input_ids,
            attention_mask=None if real.all() else real.to(input_ids.device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            all_ids=input_ids,
        ).last_hidden_state
        cache.bucket = bucket
        return net.lm_head(hidden[:, -1].to(net.lm_head.weight.device))

    def _step(self, key: tuple | None) -> Tensor:
        for here, following in zip(self.stages, [*self.stages[1:], None], strict=True):
            output = here.step(key)
            if following is not None:
                following.input.copy_(output, non_blocking=True)
        return output


def stage_parts(net: Model) -> list[tuple[list[str], torch.device]]:
    """The parts of the model in order ("embedding", "0", "1", ..., "norm", "head"), grouped by device."""
    parts = ["embedding", *map(str, range(net.config.num_layers)), "norm", "head"]
    places = zip(parts, Placement.of(net).map.values(), strict=True)
    runs = groupby(places, key=lambda place: place[1])
    return [([part for part, _ in run], as_device(label)) for label, run in runs]


def state_of(net: Model) -> tuple:
    """What a recorded step depends on beside its inputs: where the weights are, and how each adapter is switched."""
    addresses = tuple(parameter.data_ptr() for parameter in net.parameters())
    switches = tuple(
        (layer.disable_adapters, tuple(layer.merged_adapters), tuple(layer.active_adapters), *layer.scaling.values())
        for layer in net.modules()
        if hasattr(layer, "lora_A")
    )
    return addresses, switches


def fetch(token: Tensor) -> Callable[[], list[int]]:
    """Start copying [B] ids to the host; the returned call waits for them and gives them as a list."""
    if token.device.type != "cuda":
        return token.tolist
    there = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
    with torch.cuda.device(token.device):
        there.copy_(token, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return there.tolist()

    return wait
