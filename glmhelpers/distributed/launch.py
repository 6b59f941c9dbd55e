"""Start a job from a notebook: torchrun as a process of its own, its lines shown as they come.

    launch(Job(...), processes=2)
      │ checks here what can be checked here: files, plan, number of GPUs            -> one sentence, nothing started
      ▼
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m glmhelpers.distributed --folder ...
      │ a list of arguments, no shell; a rank that dies or hangs makes torchrun start all of them again
      ▼
    lines, and the log of the finished run

Several machines: run `torchrun_command(job, 2, nodes=2, meet="10.0.0.1:29500")` on each of them, from a shell,
with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 set.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from glmhelpers.distributed.job import Job
from glmhelpers.distributed.processes import REFUSED, StartError
from glmhelpers.utils.environment import OWN_PLACE
from thuglm import ChatGLMConfig


def torchrun_command(
    job: Job,
    processes: int,
    restarts: int = 3,
    nodes: int | str = 1,
    meet: str = "",
    program: Sequence[str] = ("-m", "glmhelpers.distributed"),
) -> list[str]:
    """The command that starts `processes` ranks of a job on this machine, as a list of arguments.

    Args:
        restarts: how often all ranks may be started again after one of them failed.
        nodes: machines; "1:2" goes on with one if the other is lost and does not come back.
        meet: host:port of one of the machines, the same on all; only for several.
        program: what each process runs.
    """
    # Or torchrun would look up this machine's own name, which nobody knows on some, and wait for ever.
    place = ["--standalone", "--local-addr", "127.0.0.1"]
    if meet:
        place = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", meet, "--rdzv-id", "glm"]
    counts = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *place, *counts, *program, *job.arguments()]


def refuse_job(job: Job, processes: int) -> None:
    """Refuse, before a process is started, a job that cannot work with so many processes on this machine.

    Raises:
        StartError: one sentence that says what is wrong and what to do.
    """
    for path in (Path(job.folder) / "config.json", *map(Path, filter(None, (job.rows, job.eval_rows)))):
        if not path.is_file():
            raise StartError(f"{path} is not there: give the base's folder and a file of rows (notebooks 01 and 02)")
    if job.start_from and not Path(job.start_from).is_dir():
        raise StartError(f"{job.start_from} is not there: give an adapter's folder, or nothing for a fresh adapter")
    if processes < 1:
        raise StartError(f"{processes} processes were asked for: one is the least")
    if job.on_gpu and processes > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise StartError(f"{processes} processes need a GPU each, there are {gpus}: start {gpus}, or device='cpu'")
    if job.ranks and processes % job.ranks:
        raise StartError(f"{processes} processes cannot be pipelines of {job.ranks} ranks each: start a multiple")
    try:
        job.plan(ChatGLMConfig.from_pretrained(job.folder).num_layers, processes)
    except ValueError as error:
        raise StartError(str(error)) from None


def launch(
    job: Job,
    processes: int = 2,
    restarts: int = 3,
    say: Callable[[str], Any] = print,
    program: Sequence[str] = ("-m", "glmhelpers.distributed"),
) -> list[dict[str, Any]]:
    """Train with so many processes on this machine, and return the log: dicts with `step` and `loss`.

    Called again after an interruption, it goes on from the last complete checkpoint.

    Args:
        job: what and how.
        processes: one for each GPU.
        restarts: how often all ranks may be started again after one of them failed.
        say: called with each line that torchrun or a rank prints.
        program: what each process runs.

    Raises:
        StartError: the job cannot work; one sentence.
        RuntimeError: the processes failed, more often than they may be restarted; the last lines are in the message.
    """
    refuse_job(job, processes)
    # The processes find the package where this one has it, and are no part of a group that this one may be in.
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in known}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OWN_PLACE), os.environ.get("PYTHONPATH")]))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command, lines = torchrun_command(job, processes, restarts, program=program), []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
    with subprocess.Popen(command, env=environment, errors="replace", **pipes) as running:
        try:
            for line in running.stdout or ():
                lines.append(line.rstrip("\n"))
                say(lines[-1])
        except BaseException:
            running.terminate()  # torchrun ends its ranks
            raise
    if refused := [line for line in lines if line.startswith(REFUSED)]:
        raise StartError(refused[0].removeprefix(REFUSED))
    if running.returncode:
        last = "\n".join(lines[-30:])
        raise RuntimeError(f"the processes failed (exit code {running.returncode}); their last lines:\n{last}")
    return json.loads(job.log_file.read_text(encoding="utf-8"))
