"""Tokens a second of batch-1 decoding with full-size random float16 weights, made on the GPU in seconds.

    python benchmarks/decode.py                   about 3 minutes on an H100
    python benchmarks/decode.py --scale tiny      seconds, also on a CPU
    python benchmarks/decode.py --gpus 2          only the split over two GPUs (default: one, then two if there are two)

For each number of GPUs, prompt length (64, 512) and adapter (merged, unmerged) three ways to the same greedy tokens:

    plain     model.generate with a growing cache
    fixed     glmhelpers.inference.decoder.Decoder without graphs: fixed cache, every kernel launched from Python
    graphs    the same with one CUDA graph per GPU

One JSON line each:

    tokens_per_s        without the first token: (new - 1) / (seconds - first_s); the best of `--repeats`
    first_s             seconds from the call to the first token on the host
    ms_per_token        its inverse;  floor_ms = bytes of all weights that a token needs / measured copy bandwidth
    record_s            once per shape: recording the graphs (and making the buffers)
    same_tokens         tokens equal to plain, from the first on; ties: how far the first other token is from the
                        likeliest one in a plain forward pass, in standard deviations of the logits. Random weights
                        have near-ties that float16 rounding decides; anything beyond 0.05 fails.

Before that a small float32 model, where rounding decides nothing: there all tokens must be equal. At last one line with
the kernels of a step by name. Nothing new is begun `--budget-s` seconds after the start.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.random_checkpoint import CONFIGS, make_config  # noqa: E402
from glmhelpers.devicemap.check import Placement, device_of, part_names  # noqa: E402
from glmhelpers.inference.decoder import Decoder  # noqa: E402
from thuglm import ChatGLMForConditionalGeneration  # noqa: E402

TIE = 0.05
"""Largest distance of two logits, in standard deviations, that counts as a tie in float16."""


def main() -> None:
    """Check, measure, print; exit status 1 if tokens differ."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--scale", choices=list(CONFIGS), default="full")
    options.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs to split over; 0 is the CPU")
    options.add_argument("--prompts", type=int, nargs="+", default=[64, 512])
    options.add_argument("--new", type=int, default=128, help="new tokens")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--budget-s", type=float, default=210)
    options.add_argument("--no-profile", action="store_true")
    chosen = options.parse_args()
    started = time.perf_counter()
    there = torch.cuda.device_count()
    counts = chosen.gpus or ([1, 2][: min(there, 2)] or [0])
    wrong = 0
    for line in all_lines(chosen, counts, started + chosen.budget_s):
        wrong += line.get("ok") is False
        print(json.dumps({"bench": "decode", "scale": chosen.scale} | line), flush=True)
    sys.exit(1 if wrong else 0)


def all_lines(chosen: argparse.Namespace, counts: list[int], deadline: float) -> Iterator[dict]:
    """Every line, in order."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    yield {"what": "machine", "device": gpu, "torch": torch.__version__, "gpus": torch.cuda.device_count()}
    for gpus in counts:
        yield {"what": "check", "gpus": gpus} | check_in_float32(gpus, min(chosen.new, 48))
    bandwidth = copy_bandwidth() if max(counts) else 0.0
    if bandwidth:
        yield {"what": "copy", "gb_per_s": round(bandwidth / 1e9)}
    for gpus in counts:
        dtype = torch.float16 if gpus else torch.float32
        clock = time.perf_counter()
        net = random_model(make_config(chosen.scale), gpus, dtype)
        sync()
        read = weight_bytes(net)
        yield {"what": "model", "gpus": gpus, "seconds": since(clock), "weight_bytes": read}
        model = with_adapter(net)
        for prompt in chosen.prompts:
            for adapter in ("unmerged", "merged"):
                case = {"what": "decode", "gpus": gpus, "prompt": prompt, "new": chosen.new, "adapter": adapter}
                if time.perf_counter() > deadline:
                    yield case | {"skipped": "out of time: --budget-s"}
                    continue
                if adapter == "merged":
                    model.merge_adapter()
                floor = {"floor_ms": round(read / bandwidth * 1e3, 3)} if bandwidth else {}
                for line in measure(model, net, prompt, chosen):
                    yield case | floor | line
                if adapter == "merged":
                    model.unmerge_adapter()
        if gpus == 1 and not chosen.no_profile and time.perf_counter() < deadline:
            yield {"what": "kernels", "gpus": gpus} | kernels(model, net)
        del model, net
        if gpus:
            torch.cuda.empty_cache()


def since(started: float) -> float:
    """Seconds since `started`, to the millisecond."""
    return round(time.perf_counter() - started, 3)


def sync() -> None:
    """Wait for all GPUs."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


# The model ------------------------------------------------------------------------------------------------------------


def random_model(config: Any, gpus: int, dtype: torch.dtype) -> ChatGLMForConditionalGeneration:
    """A model of random numbers, made where they are used; the blocks are shared out evenly.

    The head is not the embedding, or each token would be followed by itself; the row of `<eop>` is zero, so that no
    answer ends early.
    """
    parts = part_names(config.num_layers)
    places = {part: (number * gpus // len(parts) if gpus else "cpu") for number, part in enumerate(parts)}
    places = Placement.of(places, config.num_layers)
    with torch.device("meta"):
        net = ChatGLMForConditionalGeneration(config)
    net.config.tie_word_embeddings = False
    torch.manual_seed(0)
    for name, parameter in list(net.named_parameters(remove_duplicate=False)):
        value = torch.empty(parameter.shape, dtype=dtype, device=device_of(name, places))
        if "layernorm" in name:
            value.fill_(float(name.endswith("weight")))
        else:
            value.normal_(std=0.02)
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    net.all_tied_weights_keys = {}
    net.lm_head.weight.data[config.eos_token_id] = 0
    return net.place(places.map).eval()


def with_adapter(net: nn.Module) -> nn.Module:
    """LoRA of rank 8 on query_key_value with a B that is not zero, fused as the course uses it."""
    from peft import LoraConfig, get_peft_model

    from glmhelpers.lora.layer import fuse_lora

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net, LoraConfig(r=8, lora_alpha=32, target_modules=["query_key_value"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    model.requires_grad_(False)
    fuse_lora(model)
    return model


def weight_bytes(net: nn.Module) -> int:
    """Bytes that one token needs: every parameter but the embedding, of which it reads a row."""
    table = net.transformer.word_embeddings.weight
    return sum(parameter.nbytes for parameter in net.parameters() if parameter is not table)


def prompt_ids(config: Any, length: int) -> Tensor:
    """A random prompt [1, length] up to `<sop>`."""
    generator = torch.Generator().manual_seed(length)
    low = torch.randint(5, min(config.gmask_token_id, config.mask_token_id) - 5, (1, length - 2), generator=generator)
    return torch.cat((low, torch.tensor([[config.gmask_token_id, config.bos_token_id]])), dim=1)


def copy_bandwidth() -> float:
    """Bytes a second that GPU 0 reads and writes when it copies 1 GiB; the best of five."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda:0")
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / best


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(model: nn.Module, net: nn.Module, prompt: int, chosen: argparse.Namespace) -> Iterator[dict]:
    """plain, fixed and graphs for one prompt length and state of the adapter."""
    ids, plain = prompt_ids(net.config, prompt), []
    ways: dict[str, Callable] = {"plain": lambda count: run_plain(model, ids, count)}
    ways["fixed"] = decoder_way(Decoder(model, graphs=False), ids)
    if any(p.device.type == "cuda" for p in net.parameters()):
        ways["graphs"] = decoder_way(Decoder(model), ids)
    for name, way in ways.items():
        clock = time.perf_counter()
        way(chosen.new)  # kernels are loaded, buffers made, graphs recorded
        sync()
        warm = since(clock)
        best: dict[str, Any] = {}
        for _ in range(chosen.repeats):
            tokens, first, seconds = way(chosen.new)
            speed = (len(tokens) - 1) / max(seconds - first, 1e-9)
            if speed > best.get("tokens_per_s", 0):
                best = {"way": name, "tokens_per_s": round(speed, 1), "ms_per_token": round(1e3 / speed, 3)}
                best |= {"first_s": round(first, 4), "seconds": round(seconds, 3)}
        if name == "plain":
            plain = tokens
        else:
            best |= {"record_s": round(max(warm - best["seconds"], 0), 3)} | compare(net, model, ids, plain, tokens)
        yield best


def run_plain(model: nn.Module, ids: Tensor, count: int) -> tuple[list[int], float, float]:
    """(new tokens, seconds to the first, seconds to the last) of `model.generate`."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when the first new token is there; the first `put` is the prompt."""

        times: list[float]

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    clock.times = []
    device = next(p.device for n, p in model.named_parameters() if "word_embeddings" in n)
    sync()
    started = time.perf_counter()
    output = model.generate(input_ids=ids.to(device), do_sample=False, max_new_tokens=count, streamer=clock)
    tokens = output[0, ids.shape[1] :].tolist()
    return tokens, clock.times[1] - started, time.perf_counter() - started


def decoder_way(decoder: Decoder, ids: Tensor) -> Callable[[int], tuple[list[int], float, float]]:
    """The same for a Decoder."""

    def way(count: int) -> tuple[list[int], float, float]:
        sync()
        started, first, tokens = time.perf_counter(), 0.0, []
        for (token,) in decoder.stream(ids, max_new_tokens=count):
            first = first or time.perf_counter() - started
            tokens.append(token)
        return tokens, first, time.perf_counter() - started

    return way


@torch.no_grad()
def compare(net: nn.Module, model: nn.Module, ids: Tensor, plain: list[int], other: list[int]) -> dict:
    """Are the tokens those of plain decoding, up to a tie?"""
    same = next((n for n, pair in enumerate(zip(plain, other, strict=True)) if pair[0] != pair[1]), len(plain))
    if same == len(plain):
        return {"same_tokens": same, "of": len(plain), "ok": True}
    before = torch.cat((ids, torch.tensor([plain[:same]], dtype=torch.int64)), dim=1)
    device = net.transformer.word_embeddings.weight.device
    logits = net(input_ids=before.to(device), use_cache=False, logits_to_keep=1).logits[0, -1].float()
    distance = ((logits.max() - logits[[plain[same], other[same]]].min()) / logits.std()).item()
    return {"same_tokens": same, "of": len(plain), "ties": round(distance, 4), "ok": distance <= TIE}


def check_in_float32(gpus: int, count: int) -> dict:
    """A small float32 model: the tokens of all ways must be equal, adapter unmerged and merged, alone and padded."""
    net = random_model(make_config("tiny"), gpus, torch.float32)
    model, compared, decoders = with_adapter(net), 0, {graphs: Decoder(net, graphs=graphs) for graphs in (False, True)}
    ok = True
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        for length in (7, 40, 300, 9):
            ids = prompt_ids(net.config, length)
            plain = run_plain(model, ids, count)[0]
            for decoder in decoders.values():
                ok &= decoder.generate(ids, max_new_tokens=count)[0] == plain
                compared += count
    model.unmerge_adapter()
    return {"ok": ok, "tokens_compared": compared, "graphs": decoders[True].recorded}


def kernels(model: nn.Module, net: nn.Module, steps: int = 8) -> dict:
    """Kernels of one step (fixed cache, no graph) and how long they run; milliseconds a token, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    decoder, ids = Decoder(model, graphs=False), prompt_ids(net.config, 64)
    try:
        found = []
        for count in (2, 2 + steps):
            decoder.generate(ids, max_new_tokens=count)
            sync()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
                decoder.generate(ids, max_new_tokens=count)
                sync()
            found.append({e.key: (_gpu_time(e), e.count) for e in trace.key_averages()})
    except Exception as error:  # a profiler that does not start must not cost the measurements
        return {"skipped": f"{type(error).__name__}: {error}"}
    short, long = found
    names = {key: tuple(a - b for a, b in zip(now, short.get(key, (0, 0)), strict=True)) for key, now in long.items()}
    launches = sum(count for key, (_, count) in names.items() if key.startswith("cudaLaunchKernel")) / steps
    times = {key: (us / steps / 1e3, n / steps) for key, (us, n) in names.items() if us > 0}
    top = sorted(times.items(), key=lambda item: -item[1][0])[:14]
    return {
        "launches_per_token": round(launches),
        "kernel_ms_per_token": round(sum(ms for ms, _ in times.values()), 3),
        "top": [[key[:90], round(ms, 4), round(count, 1)] for key, (ms, count) in top],
    }


def _gpu_time(event: Any) -> float:
    """Microseconds of a kernel; 0 for everything that ran on the host."""
    return event.self_device_time_total if str(event.device_type).endswith("CUDA") else 0.0


if __name__ == "__main__":
    main()
