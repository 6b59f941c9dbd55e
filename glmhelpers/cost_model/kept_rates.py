"""What was measured on this machine, kept between sessions: one small JSON file in the user's cache folder.

    ~/.cache/glmhelpers/machine.json     "HOST, 8 cores, torch 2.11.0"  ->  "Tesla T4"  ->  name of a rate -> number

Another host, another number of cores or another torch is another machine: nothing of it is believed. So is a file that
is damaged or holds anything but positive numbers under known names.
"""

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from glmhelpers.utils.files import read_json, write_json
from glmhelpers.utils.folders import user_cache

RATES = (
    *("matrix_share", "memory_share", "attention_share", "link"),
    *("launch_forward", "launch_again", "launch_backward", "launch_step", "gemm_workspace", "context"),
)
"""Fields of a GPU that are measured."""
BYTES = ("gemm_workspace", "context")


def kept_file() -> Path:
    """Where they are kept."""
    return user_cache() / "machine.json"


def machine_key() -> str:
    """This machine, as far as rates depend on it."""
    return f"{platform.node()}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs, torch {torch.__version__}"


def kept_rates() -> dict[str, dict[str, float]]:
    """Driver's name of a GPU -> its rates as measured here; {} if nothing was measured."""
    try:
        cards = read_json(kept_file())[machine_key()]
        return {name: _checked(rates) for name, rates in cards.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def keep_rates(cards: Mapping[str, Mapping[str, float]]) -> None:
    """Keep the rates of this machine's GPUs in place of older ones; {}: from now on the catalogue counts again.

    A folder that cannot be written is no error.
    """
    path = kept_file()
    try:
        kept = read_json(path)
        others = {key: value for key, value in kept.items() if key != machine_key()}
    except (OSError, ValueError, AttributeError):
        others = {}
    with suppress(OSError):
        write_json(path, others | {machine_key(): cards})


def _checked(rates: Mapping[str, float]) -> dict[str, float]:
    limits = {name: 2 if name.endswith("_share") else 1e15 for name in RATES}  # no card is twice its datasheet
    if not all(0 < float(value) < limits[name] for name, value in rates.items()):
        raise ValueError("not what was kept")
    return {name: int(value) if name in BYTES else float(value) for name, value in rates.items()}
