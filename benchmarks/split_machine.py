"""The two halves of `two_gpus.py`: two GPUs capped to what a T4 gives, or a stand-in for them on any machine.

two GPUs    full-size random float16 weights, made where they are used, 14.75 GiB a GPU
one, none   the tiny checkpoint in float32 on cuda:0 and the CPU, or on the CPU alone
"""

import json
import sys
import zlib
from copy import deepcopy
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from glmhelpers.cost_model.step_memory import predict  # noqa: E402
from glmhelpers.devicemap.check import part_names  # noqa: E402
from glmhelpers.utils.units import GIB  # noqa: E402
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer  # noqa: E402

TINY = PROJECT / "data" / "tiny-chatglm"
CAP = 14.75 * GIB
SIZES = ["14.75GiB"] * 2


class Machine:
    """Where the two halves go, and how large everything is."""

    def __init__(self, tiny: bool):
        self.tiny, gpus = tiny, torch.cuda.device_count()
        if not tiny and gpus < 2:
            raise SystemExit(f"this machine has {gpus} GPUs: the full run needs 2, --tiny runs anywhere")
        self.devices = ["cuda:0", "cuda:1"] if gpus > 1 else ["cuda:0", "cpu"] if gpus else ["cpu", "cpu"]
        self.on_gpu = gpus > 0
        self.dtype = torch.float32 if tiny else torch.float16
        self.tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
        names = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
        own = {name: getattr(self.tokenizer, name) for name in names}
        self.config = ChatGLMConfig.from_pretrained(TINY) if tiny else ChatGLMConfig(**own)
        self.length = 64 if tiny else 1024
        self.cut = (5, 3) if tiny else (15, 13)
        if gpus > 1:
            self.cap(CAP)

    def cap(self, size: float) -> None:
        """From now on, take no more than these bytes of each GPU."""
        for device in range(0 if self.tiny else 2):
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), device)

    def device_map(self, cut: tuple[int, ...] | None = None, tied: bool = True) -> dict[str, str]:
        """Blocks as cut; embedding with the head on the last device; on one device for a cut of one number."""
        embedding, *blocks, norm, head = part_names(self.config.num_layers)
        homes = [device for device, count in zip(self.devices, cut or self.cut, strict=False) for _ in range(count)]
        last = homes[-1]
        return {embedding: last if tied else homes[0], **dict(zip(blocks, homes, strict=True)), norm: last, head: last}

    def model(self, places: dict[str, str]) -> ChatGLMForConditionalGeneration:
        """The tiny checkpoint, or full-size random weights, the same for each process, made where they are used."""
        if self.tiny:
            return ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=self.dtype, device_map=places)
        return random_net(self.config, places, self.dtype, self.devices[0]).place(places)

    def reset_peaks(self) -> None:
        """From now on, peaks are counted."""
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)

    def compare_peaks(
        self, places: dict[str, int | str], batch: dict[str, torch.Tensor], checkpointed: Any, **chosen: Any
    ) -> dict[str, Any]:
        """Peaks of a step: what the formula says for these GPUs, whose workspaces differ from a T4's, and what was.

        Args:
            places: part of the model -> number of its GPU.
            batch: of the step; checkpointed: as for `predict`; chosen: micro_batches, loss_chunk, in_flight.
        """
        rows, length = batch["labels"].shape
        chosen["label_share"] = (batch["labels"][:, 1:] != -100).float().mean().item()
        guess = predict(
            self.config,
            places,
            rows,
            length,
            gpus=["H100" if self.on_gpu else "T4"] * 2,
            dtype=str(self.dtype).removeprefix("torch."),
            checkpointed=checkpointed,
            **chosen,
        ).peak_bytes
        peaks = [torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())]
        return {
            "batch": rows,
            "length": length,
            **chosen,
            "predicted_peak_bytes": guess,
            "peak_bytes": peaks,
            "difference": [round(g / p - 1, 4) for g, p in zip(guess, peaks, strict=False)],
        }

    def sync(self) -> None:
        """Wait for every GPU."""
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def random_net(
    config: ChatGLMConfig, places: dict[str, str], dtype: torch.dtype, device: str
) -> ChatGLMForConditionalGeneration:
    """A ChatGLM with random weights that depend on a tensor's name alone, made where they are used.

    Args:
        config: sizes.
        places: part -> device, with no number left out ("cuda:0"); what is not named stays on "meta". The head is the
            embedding's tensor.
        dtype: of all weights.
        device: where the rotary table goes.
    """
    with torch.device("meta"):
        net = ChatGLMForConditionalGeneration(deepcopy(config))
    for name, parameter in list(net.named_parameters()):
        place = next((home for part, home in places.items() if name.startswith(part + ".")), None)
        if place is None or name == "lm_head.weight":
            continue
        value = torch.empty(parameter.shape, dtype=dtype, device=place)
        if "layernorm" in name:
            value.fill_(float(name.endswith("weight")))
        else:
            value.normal_(std=0.02, generator=torch.Generator(place).manual_seed(zlib.crc32(name.encode())))
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    net.lm_head.weight = net.transformer.word_embeddings.weight
    rotary = net.transformer.rotary_emb
    rotary.inv_freq = rotary.frequencies().to(device)
    net.config.dtype = dtype
    return net


def line(figure: str, **values: Any) -> dict:
    """One result, printed at once."""
    values = {"bench": "two_gpus", "figure": figure, **values}
    print(json.dumps(values, ensure_ascii=False), flush=True)
    return values
