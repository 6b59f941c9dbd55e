"""The processes of a run: who they are, how they talk, and whether they agree.

torchrun, accelerate launch ──► RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT     `check_start`
world = pipelines x ranks of a pipeline     DeviceMesh("dp", "pp"), neighbours of a pipeline side by side
nccl for GPUs, gloo for everything on the CPU; a wait longer than `timeout` seconds is an error, not a silence
versions, plan, rows, base of every rank compared with those of rank 0, before the first step      `agree`
"""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from glmhelpers.distributed.hang import Places

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
VERSIONS = ("torch", "transformers", "peft", "safetensors")

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, torchrun makes a new store for each attempt; without it restarts of several machines do not work."""

NO_DUMP = "TORCH_NCCL_DUMP_ON_TIMEOUT"
"""Set to 0, NCCL tells nobody to write its log of all messages when a wait is too long."""

REFUSED = "refused: "
"""Begins the line in which a process says why it was refused; `launch` looks for it."""


class StartError(RuntimeError):
    """The processes were started in a way that cannot work; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        mesh: ("dp", "pp"): pipelines, ranks of a pipeline.
        device: this rank's.
        local_rank: number of this process on its machine.
        places: where all of them are; None: nobody looks whether one hangs.
    """

    mesh: DeviceMesh
    device: torch.device
    local_rank: int = 0
    places: Places | None = None

    @property
    def rank(self) -> int:
        """Number of this process among all."""
        return dist.get_rank()

    @property
    def pipelines(self) -> int:
        """How many pipelines there are."""
        return self.mesh["dp"].size()

    @property
    def pipeline(self) -> int:
        """Which of them this process is in."""
        return self.mesh["dp"].get_local_rank()

    @property
    def stage_rank(self) -> int:
        """Its place in the pipeline."""
        return self.mesh["pp"].get_local_rank()

    def at(self, step: int, doing: int) -> None:
        """Tell where this process is, see `Places.at`."""
        if self.places:
            self.places.at(step, doing)


def check_start(ranks: int, on_gpu: bool, environment: Mapping[str, str] | None = None) -> None:
    """Refuse a start that cannot work, before anything waits for anything.

    Args:
        ranks: processes of one pipeline; 0: all of them.
        on_gpu: one GPU for each process is needed.
        environment: environment variables; this process' own by default.

    Raises:
        StartError: says what is wrong and how to start.
    """
    environment = os.environ if environment is None else environment
    count = ranks or 2
    how = f"torchrun --nproc-per-node {count} -m glmhelpers.distributed ..."
    if missing := [name for name in NEEDED if not environment.get(name)]:
        raise StartError(f"{missing[0]} is not set, so this is no process among others: start it with {how}")
    world, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"])
    if ranks and world % ranks:
        raise StartError(f"{world} processes cannot be pipelines of {ranks} ranks each: start {count} or a multiple")
    restarts, machines = (int(environment.get(name, 0)) for name in ("TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"))
    if restarts and machines > 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Each agent counts attempts for itself: with a store that outlives them, ranks would meet the dead.
        raise StartError(f"several machines and restarts need {OWN_STORE}=1 in torchrun's environment: set it on all")
    if on_gpu and local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise StartError(f"process {local} of this machine has no GPU, there are {gpus}: start {gpus} a machine")


@contextmanager
def joined(ranks: int, on_gpu: bool, timeout: float) -> Iterator[Processes]:
    """Join the other processes; leave them at the end of the block, or behind an error with the end of this process.

    Args:
        ranks: processes of one pipeline; 0: all of them.
        on_gpu: each process takes the GPU of its number on the machine.
        timeout: seconds that a process waits for another before it gives up, and torchrun starts all of them again.

    Raises:
        StartError: see `check_start`.
    """
    check_start(ranks, on_gpu)
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    patience = timedelta(seconds=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=patience))
    # torchrun may keep one store for all attempts, with addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # A wait that was too long leaves a mark in the bare store: NCCL of the next attempt would see it, and end as well.
    os.environ.setdefault(NO_DUMP, "0")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    places = Places(store, rank, world, timeout)
    try:
        yield Processes(make_mesh(ranks or world, device.type, patience), device, local, places)
    finally:
        places.stop()
    # Not behind an error: NCCL would wait for kernels whose other rank never comes, and nobody would read the error.
    dist.destroy_process_group()


def make_mesh(ranks: int, device_type: str, timeout: timedelta) -> DeviceMesh:
    """The mesh ("dp", "pp") of all processes; its groups have this timeout too: `init_device_mesh` cannot give one."""
    table = torch.arange(dist.get_world_size()).view(-1, ranks)
    groups = {}
    for name, lines in (("dp", table.T), ("pp", table)):
        for line in lines.tolist():  # every process takes part in making every group
            group = dist.new_group(line, timeout=timeout)
            if dist.get_rank() in line:
                groups[name] = group
    if device_type == "cuda":
        # Schedules call a neighbour only, but NCCL makes a group in its first call, in which all ranks must take part.
        dist.all_reduce(torch.zeros(1, device=device_type), group=groups["pp"])
    return DeviceMesh.from_group([groups["dp"], groups["pp"]], device_type, table, mesh_dim_names=("dp", "pp"))


def facts_here() -> dict[str, str]:
    """Versions on this machine."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def agree(facts: Mapping[str, Any]) -> None:
    """Refuse to go on unless all ranks have the same facts.

    Args:
        facts: name -> value, both comparable after a journey.

    Raises:
        StartError: the same on all ranks; names the rank, its machine, and the first fact that differs.
    """
    mine = {"machine": platform.node(), "facts": dict(facts)}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    wanted = everybody[0]["facts"]
    for rank, found in enumerate(everybody):
        for name, value in wanted.items():
            if found["facts"].get(name) != value:
                raise StartError(
                    f"rank {rank} on {found['machine']} has {name} {found['facts'].get(name)!r}, rank 0 on "
                    f"{everybody[0]['machine']} has {value!r}: start both with the same"
                )
