"""One run on two real GPUs: the split, the overlap, the prediction. One JSON line a figure.

    python benchmarks/two_gpus.py              full size; each GPU capped to 14.75 GiB, what a T4 gives
    python benchmarks/two_gpus.py --tiny       the tiny model: cuda:0 and the CPU, or the CPU alone (CI runs this)

    placement    the planner's map at several batches: predicted and measured peak of each GPU
    equality     LoRA gradients of one batch on two GPUs against one; with dropout, checkpointed against not
    overlap      a step in 1, 2, 4, 8 micro-batches, with the cut for the least memory and that for the most speed;
                 Gantt charts of the first and the last; idle share of each GPU
    graphs       4 rows in 4 parts: CUDA graphs against none, in turns
    parts        a step in 1, 8, 12, 24 micro-batches, in turns: checkpointed, not, and as CUDA graphs; then with all
                 micro-batches in flight, 2 and 3 of them, each GPU capped: times and peaks
    planned      the planner's fastest plan for that batch in 8 parts, with the blocks that it need not run again
    trainer      50 steps on rows of the course, killed and taken up again, against an unbroken run; the adapter's proof
    chat         an answer of the split model; tokens a second split and unsplit

Full-size weights are random and float16, so nothing is learnt but the rows; --tiny takes the tiny checkpoint. Attention
runs on the memory-efficient kernel, the one that a T4 has.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks.split_machine import CAP, SIZES, Machine, line  # noqa: E402
from benchmarks.split_speed import few_in_flight, graphs, more_parts, overlap, planned  # noqa: E402
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only  # noqa: E402
from glmhelpers.devicemap.check import part_names  # noqa: E402
from glmhelpers.devicemap.plan import largest_batch, plan_device_map  # noqa: E402
from glmhelpers.inference.decoder import Decoder  # noqa: E402
from glmhelpers.lora.adapter import load_adapter, save_adapter  # noqa: E402
from glmhelpers.lora.attach import attach_lora  # noqa: E402
from glmhelpers.lora.proof import prove  # noqa: E402
from glmhelpers.tokens.collate import RightPadCollator  # noqa: E402
from glmhelpers.training.finetune import train, training_arguments  # noqa: E402
from glmhelpers.training.measure import random_batch  # noqa: E402
from glmhelpers.training.pipeline import run_step  # noqa: E402
from glmhelpers.utils.units import GIB  # noqa: E402

STEPS = 50
PARTS = ["placement", "equality", "overlap", "graphs", "planned", "parts", "trainer"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> adapter parameter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_dropout(model: nn.Module, p: float) -> None:
    """Dropout of every adapter."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def with_random_b(model: nn.Module) -> nn.Module:
    """B is 0 at the start, and then A has no gradient: give it numbers, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


def placement(machine: Machine, model: nn.Module) -> None:
    """Predicted and measured peaks of the planner's memory plan, with Adam."""
    rows = [4, 8] if machine.tiny else [4, 8, largest_batch(machine.config, SIZES, machine.length)]
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-6)
    for count in rows:
        plan = plan_device_map(machine.config, SIZES, count, machine.length, "memory")
        wanted = tuple(len(blocks) for blocks in plan.blocks)
        cut = machine.cut if machine.tiny else wanted
        if cut != machine.cut or plan.embedding != "tied":
            line("placement", batch=count, skipped=f"the plan is {wanted}, {plan.embedding}: not the map of this model")
            continue
        checkpoint_only(model, plan.checkpointed_layers)
        for _ in range(2):
            machine.reset_peaks()
            batch = random_batch(machine.config, count, machine.length)
            run_step(model, batch, **plan.setting.for_step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            machine.sync()
        places = {name: machine.devices.index(place) for name, place in machine.device_map().items()}
        how = machine.compare_peaks(places, batch, plan.checkpointed_layers, **plan.setting.for_step)
        line("placement", cut=cut, **how)


def gradients(machine: Machine, model: nn.Module, batch: dict, seed: int = 0, **how: Any) -> dict[str, torch.Tensor]:
    """LoRA gradients of one step, on the CPU."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    run_step(model, batch, **how)
    machine.sync()
    return {name: parameter.grad.float().cpu() for name, parameter in trainable(model).items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of two sets of gradients, tensor by tensor."""
    return max(((one[name] - grad).norm() / grad.norm()).item() for name, grad in other.items())


def equality(machine: Machine, model: nn.Module, net: nn.Module) -> None:
    """Two devices against one, and recomputation against keeping, with both GPUs' backward at once."""
    scale = {} if machine.tiny else {"backward": lambda loss: (loss * 1024).backward()}
    checkpoint_only(model, range(machine.config.num_layers))
    batch = random_batch(machine.config, 4, machine.length // 2)
    short = random_batch(machine.config, 4, machine.length // 4)
    set_dropout(model, 0.1)
    kept = gradients(machine, model, short, micro_batches=4, **scale)
    checkpoint_only(model, [])
    plain = gradients(machine, model, short, micro_batches=4, **scale)
    other = gradients(machine, model, short, seed=1, micro_batches=4, **scale)
    line(
        "equality",
        what="dropout on: checkpointed against plain, one seed",
        distance=distance(kept, plain),
        another_seed=distance(other, plain),
    )
    checkpoint_only(model, range(machine.config.num_layers))
    set_dropout(model, 0.0)
    split = gradients(machine, model, batch, micro_batches=2, **scale)
    net.place(dict.fromkeys(part_names(machine.config.num_layers), machine.devices[0]))
    whole = gradients(machine, model, batch, micro_batches=2, **scale)
    line("equality", what="dropout off: two devices against one", distance=distance(split, whole))
    net.place(machine.device_map())
    set_dropout(model, 0.1)


# The Trainer, in processes of its own --------------------------------------------------------------------------------


def rows_of_the_course(machine: Machine, count: int = 200) -> list[dict]:
    """Encoded rows that teach a name."""
    rows = json.loads((PROJECT / "data" / "identity.json").read_text(encoding="utf-8"))[:count]
    encoded = []
    for row in rows:
        prompt, answer = row["instruction"], row["output"].replace("{name}", "小星")
        ids = machine.tokenizer.encode(prompt, answer)
        start = ids.index(machine.tokenizer.bos_token_id) + 1
        encoded.append({"input_ids": ids, "labels": [-100] * start + ids[start:], "length": len(ids)})
    return encoded


def train_here(machine: Machine, folder: Path) -> None:
    """The run that is killed: prints a line for each logged step, and its losses at last."""
    model = attach_lora(machine.model(machine.device_map()))
    checkpoint_only(model, range(machine.config.num_layers))
    args = training_arguments(
        folder,
        on_gpu=machine.on_gpu and not machine.tiny,
        max_steps=STEPS,
        save_steps=10,
        logging_steps=5,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        **({"use_cpu": False} if machine.on_gpu else {}),
    )
    log = train(model, rows_of_the_course(machine), RightPadCollator(machine.tokenizer), args, micro_batches=2)
    print("LOSSES " + json.dumps([entry["loss"] for entry in log if "loss" in entry]), flush=True)
    save_adapter(model, folder / "adapter")


def start_training(machine: Machine, folder: Path) -> subprocess.Popen:
    """Another process with `train_here`."""
    command = [sys.executable, __file__, "--train", str(folder), *(["--tiny"] if machine.tiny else [])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def lines_until_end(process: subprocess.Popen) -> Iterator[str]:
    """What a process prints; its failure is ours."""
    yield from process.stdout
    if process.wait():
        raise SystemExit(f"the training process ended with {process.returncode}")


def trainer(machine: Machine, folder: Path) -> Path:
    """An unbroken run, a killed one, and its second half; returns the folder of the adapter."""
    losses, seconds = {}, time.perf_counter()
    for text in lines_until_end(start_training(machine, folder / "unbroken")):
        if text.startswith("LOSSES "):
            losses["unbroken"] = json.loads(text.removeprefix("LOSSES "))
    seconds = time.perf_counter() - seconds
    broken = start_training(machine, folder / "broken")
    for text in broken.stdout:
        if text.lstrip().startswith("step") and int(text.split()[1].split("/")[0]) >= 25:
            break
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    said = []
    for text in lines_until_end(start_training(machine, folder / "broken")):
        said.append(text.strip())
        if text.startswith("LOSSES "):
            losses["resumed"] = json.loads(text.removeprefix("LOSSES "))
    line(
        "trainer",
        steps=STEPS,
        seconds=round(seconds, 1),
        first_loss=losses["unbroken"][0],
        last_loss=losses["unbroken"][-1],
        killed_after_step=25,
        resumed=next((text for text in said if "goes on from step" in text), "no"),
        largest_difference=max(abs(a - b) for a, b in zip(losses["unbroken"], losses["resumed"], strict=True)),
    )
    return folder / "unbroken" / "adapter"


def proof_and_chat(machine: Machine, adapter: Path) -> None:
    """Reload on both devices, prove, answer; decode split and unsplit."""
    net = machine.model(machine.device_map()).eval()
    ids = machine.tokenizer(["你是谁？"], return_tensors="pt")["input_ids"].to(machine.devices[0])
    reloaded = load_adapter(net, adapter)
    proof = prove(reloaded, reloaded, ids)
    places = sorted({str(p.device) for name, p in reloaded.named_parameters() if "lora_" in name})
    answer, _ = net.chat(machine.tokenizer, "你是谁？", do_sample=False, max_new_tokens=24)
    line(
        "adapter",
        largest_b_norm=round(proof.largest_b_norm, 4),
        trained_to_base=round(proof.trained_to_base, 4),
        adapters_on=places,
        answer=answer,
    )
    reloaded.eval()
    speeds, texts = {}, {}
    for name, places in (("split", None), ("unsplit", dict.fromkeys(machine.device_map(), machine.devices[0]))):
        if places:
            net.place(places)
        decoder = Decoder(reloaded)
        settings = {"max_new_tokens": 32 if machine.tiny else 128}
        decoder.generate(ids, **settings)
        machine.sync()
        start = time.perf_counter()
        texts[name] = decoder.generate(ids, **settings)[0]
        machine.sync()
        speeds[name] = round(len(texts[name]) / (time.perf_counter() - start), 1)
        del decoder
        gc.collect()
    line("decode", tokens_per_s=speeds, same_tokens=texts["split"] == texts["unsplit"], tokens=len(texts["split"]))


def attempt(name: str, part: Callable[[], Any]) -> bool:
    """Run one part; an error becomes a line, so that it does not hide the other parts. True if it went well."""
    start = time.perf_counter()
    try:
        part()
    except Exception as error:
        line(name, error=f"{type(error).__name__}: {error}"[:600])
        return False
    line("seconds", of=name, seconds=round(time.perf_counter() - start, 1))
    return True


def on_one_model(machine: Machine, out: Path, only: list[str]) -> bool:
    """What is wanted and needs no Trainer; the model is gone afterwards."""
    net = machine.model(machine.device_map())
    model = with_random_b(attach_lora(net)).train()
    parts = {
        "placement": lambda: placement(machine, model),
        "equality": lambda: equality(machine, model, net),
        "overlap": lambda: overlap(machine, model, net, out),
        "graphs": lambda: graphs(machine, model, net),
        "parts": lambda: (more_parts(machine, model, net), few_in_flight(machine, model, net)),
        "planned": lambda: planned(machine, model, net),
    }
    results = [attempt(name, part) for name, part in parts.items() if name in only]
    return all(results)


def main() -> None:
    """All figures; exit status 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", PROJECT / "build" / "two_gpus")))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; default: all")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    machine = Machine(options.tiny)
    kernels = [SDPBackend.EFFICIENT_ATTENTION, *([SDPBackend.MATH] if options.tiny else [])]
    with sdpa_kernel(kernels):
        if options.train:
            train_here(machine, options.train)
            return
        options.out.mkdir(parents=True, exist_ok=True)
        names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
        line("machine", devices=machine.devices, gpus=names, torch=torch.__version__, cap_gib=CAP / GIB)
        good = on_one_model(machine, options.out, options.only)
        gc.collect()
        torch.cuda.empty_cache()
        if "trainer" in options.only:
            with tempfile.TemporaryDirectory() as folder:
                good &= attempt("trainer", lambda: proof_and_chat(machine, trainer(machine, Path(folder))))
    sys.exit(not good)


if __name__ == "__main__":
    main()
