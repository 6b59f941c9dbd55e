"""LoRA on a base in 8 and 4 bits: milliseconds and peak memory of a step, measured beside the prediction.

    python benchmarks/packed.py                full size, one GPU; needs bitsandbytes
    python benchmarks/packed.py --tiny         a seventieth of it on the CPU

    random checkpoint on disk ─► load_quantized(bits) ─► LoRA, every block checkpointed ─► GradScaler, AdamW

One JSON line for each number of bits: `weights_bytes` is what the frozen base takes as it is stored, `peak_bytes` is
torch.cuda.max_memory_allocated in a step, and the two predictions are glmhelpers.cost_model.step_memory's.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.random_checkpoint import make_config, write_checkpoint  # noqa: E402
from benchmarks.train_step import update  # noqa: E402
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only  # noqa: E402
from glmhelpers.lora.attach import attach_lora  # noqa: E402
from glmhelpers.lora.quantized import BITS, load_quantized, stored_bytes, why_not  # noqa: E402
from glmhelpers.training.measure import random_batch  # noqa: E402
from glmhelpers.training.memory_plan import predict_training  # noqa: E402
from glmhelpers.training.pipeline import run_step  # noqa: E402
from glmhelpers.weights.layout import published_shards  # noqa: E402
from thuglm import ChatGLMForConditionalGeneration  # noqa: E402

LOSS_CHUNK = 512


def write_with_index(folder: Path, tiny: bool) -> None:
    """A random checkpoint as transformers' own loader wants it, which packs while it loads."""
    config = make_config("tiny" if tiny else "full")
    paths = write_checkpoint(folder, config, "safetensors", "cpu" if tiny else "cuda:0")
    shards = zip(published_shards(config), paths, strict=True)
    places = {name: path.name for shapes, path in shards for name in shapes}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def load(folder: Path, bits: int, on_gpu: bool) -> nn.Module:
    """The base, with LoRA (rank 8 on query_key_value) and every block checkpointed."""
    places, dtype = {"": 0 if on_gpu else "cpu"}, torch.float16 if on_gpu else torch.float32
    if bits == 16:
        model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map=places)
    else:
        model = load_quantized(folder, bits, places, dtype)
    model = attach_lora(model).train()
    checkpoint_only(model, range(model.config.num_layers))
    return model


def measure(folder: Path, bits: int, rows: int, length: int, steps: int, on_gpu: bool) -> dict:
    """Load, train some steps; whatever was allocated is gone afterwards."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model = load(folder, bits, on_gpu)
    loaded = time.perf_counter() - start
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=on_gpu)
    scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)
    batch = random_batch(model.config, rows, length)
    times = []
    for number in range(steps + 2):
        if on_gpu and number == 2:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss = run_step(model, batch, backward=lambda loss: scaler.scale(loss).backward(), loss_chunk=LOSS_CHUNK)
        update(scaler, optimizer)
        loss = loss.item()
        times.append((time.perf_counter() - begin) * 1e3)
    share = (batch["labels"][:, 1:] != -100).float().mean().item()
    predicted = predict_training(model, rows, length, loss_chunk=LOSS_CHUNK, label_share=share)
    guess, terms = predicted.peak_bytes[0], predicted.breakdown[0]
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return {
        "bench": "packed",
        "bits": bits,
        "batch": rows,
        "length": length,
        "load_seconds": round(loaded, 1),
        "loss": round(loss, 3),
        "ms": round(statistics.median(times[2:]), 1),
        "weights_bytes": stored_bytes(model),
        "predicted_weights_bytes": terms["weights"] + terms["embedding"],
        "peak_bytes": peak,
        "predicted_peak_bytes": guess,
        "difference": round(guess / peak - 1, 4) if peak else None,
        "moment": predicted.moments[0],
    }


def main() -> None:
    """Read the command line, measure, print a JSON line for each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[16, *BITS], choices=[16, *BITS])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a seventieth of the size, on the CPU")
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: use --tiny for a small model on the CPU")
    kernels = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION] if options.tiny else [SDPBackend.EFFICIENT_ATTENTION]
    with tempfile.TemporaryDirectory() as scratch, sdpa_kernel(kernels):
        folder = Path(scratch)
        write_with_index(folder, options.tiny)
        for bits in options.bits:
            result = measure(folder, bits, options.batch, options.length, options.steps, not options.tiny)
            print(json.dumps(result), flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
