"""Seconds and host memory of `load_model` on a full-size checkpoint, beside plain reading of the same files.

    python benchmarks/load.py                     13.4 GB, twice: .bin, then safetensors (some minutes; 14 GB of disk)
    python benchmarks/load.py --scale tenth       1.3 GB          --scale tiny       0.2 GB
    python benchmarks/load.py --folder /disk/x    where to write; the system's temporary folder if left out

For each format, write the files. Then, with the page cache emptied of them ("cold", posix_fadvise) and filled ("warm"):
read them plainly (one thread, 16 MiB at a time), and load in a fresh process, to the first GPU, and with the first half
on the GPU and the rest on the CPU; warm also by `from_pretrained` of transformers. At last
sha256 of all files against plain reading. One JSON line each:

    seconds             the call of load_model;  ratio = seconds / plain_seconds in the same state of the cache
    rss_growth_bytes    largest resident memory during the call, less that of the process with torch imported and CUDA
                        started; so importing transformers and thuglm counts as growth, too (see import_bytes)
    kept_on_cpu_bytes   parameters that stay on the CPU: they are wanted there; ..._less_kept_bytes is growth without
    cached_share        part of the files that was in the page cache before, from 64 probes a file; null: cannot say

`--budget-s` seconds (default 270) after the start nothing new is begun; what is left out is named in a line.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BLOCK = 16 * 2**20
LOADERS = ("load_model", "from_pretrained")


def main() -> None:
    """Write, read plainly, load, verify; one JSON line each."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--scale", choices=["full", "tenth", "tiny"], default="full")
    options.add_argument("--formats", nargs="+", choices=["bin", "safetensors"], default=["bin", "safetensors"])
    options.add_argument("--folder", type=Path, help="where to write the files")
    options.add_argument("--budget-s", type=float, default=270)
    options.add_argument("--workers", type=int, help="reading threads of load_model")
    options.add_argument(
        "--load", metavar="PLACEMENT", help="load --folder in this process (used by the program itself)"
    )
    options.add_argument("--loader", choices=LOADERS, default=LOADERS[0], help="with --load: which one")
    chosen = options.parse_args()
    if chosen.load:
        print(json.dumps(load_here(chosen.folder, chosen.load, chosen.workers, chosen.loader)), flush=True)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as work:
        for ending in chosen.formats:
            for line in measure_format(Path(work) / ending, chosen, ending, started + chosen.budget_s):
                print(json.dumps({"bench": "load", "scale": chosen.scale, "format": ending} | line), flush=True)
            shutil.rmtree(Path(work) / ending)


def measure_format(folder: Path, chosen: argparse.Namespace, ending: str, deadline: float) -> Iterator[dict]:
    """All lines of one file format."""
    import torch

    from benchmarks.random_checkpoint import make_config, write_checkpoint

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    files = write_checkpoint(folder, make_config(chosen.scale), ending, device)
    sizes = [path.stat().st_size for path in files]
    yield {"step": "write", "seconds": since(started), "bytes": sum(sizes), "largest_bytes": max(sizes)}
    plain = {}
    for cache in ("cold", "warm"):
        share = set_cache(files, cache)
        started = time.perf_counter()
        count = read_plainly(files)
        plain[cache] = since(started)
        speed = round(count / plain[cache] / 1e6)
        yield {"step": "plain", "cache": cache, "cached_share": share, "seconds": plain[cache], "mb_per_s": speed}
    for placement in ("cuda:0", "half") if device != "cpu" else ("cpu",):
        for loader, cache in ((LOADERS[0], "cold"), (LOADERS[0], "warm"), (LOADERS[1], "warm")):
            what = {"step": "load", "loader": loader, "placement": placement, "cache": cache}
            if time.perf_counter() > deadline:
                yield what | {"skipped": "out of time: --budget-s"}
                continue
            what["cached_share"] = set_cache(files, cache)
            found = load_in_process(folder, placement, chosen.workers, loader)
            yield what | found | {"plain_seconds": plain[cache], "ratio": round(found["seconds"] / plain[cache], 2)}
    if time.perf_counter() > deadline:
        yield {"step": "verify", "skipped": "out of time: --budget-s"}
    else:
        yield verify(folder, files, plain["cold"])


def since(started: float) -> float:
    """Seconds since `started`, to the millisecond."""
    return round(time.perf_counter() - started, 3)


def read_plainly(files: list[Path]) -> int:
    """Read all files from beginning to end, one after the other; returns the bytes."""
    block, count = bytearray(BLOCK), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(block):
                count += got
    return count


def set_cache(files: list[Path], cache: str) -> float | None:
    """Empty ("cold") or fill ("warm") the page cache for the files; returns the share that is in it then."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        if cache == "cold":
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    if cache == "warm":
        read_plainly(files)
    return cached_share(files)


def cached_share(files: list[Path]) -> float | None:
    """Share of probes that the kernel answers without waiting for the disk, or None where it does not say."""
    hits, probes = 0, 0
    for path in files:
        file, size = os.open(path, os.O_RDONLY), path.stat().st_size
        try:
            for place in range(64):
                probes += 1
                hits += os.preadv(file, [bytearray(1)], size * place // 64, os.RWF_NOWAIT)
        except BlockingIOError:
            probes += 63 - place
        except OSError:
            return None
        finally:
            os.close(file)
    return round(hits / probes, 2)


def load_in_process(folder: Path, placement: str, workers: int | None = None, loader: str = LOADERS[0]) -> dict:
    """What `load_here` finds in a fresh process."""
    command = [sys.executable, __file__, "--load", placement, "--folder", str(folder), "--loader", loader]
    if workers:
        command += ["--workers", str(workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def load_here(folder: Path, placement: str, workers: int | None = None, loader: str = LOADERS[0]) -> dict:
    """Load, measure time and memory, and check that every tensor is what its name says."""
    import torch

    if placement != "cpu":
        torch.zeros(1, device="cuda:0")
    before = status_bytes("VmRSS")
    from benchmarks.random_checkpoint import check_markers
    from glmhelpers.devicemap.check import part_names
    from glmhelpers.weights import load_model
    from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration

    names = part_names(ChatGLMConfig.from_pretrained(folder).num_layers)
    first = names[: 1 + (len(names) - 3) // 2]
    device_map = {name: 0 if name in first else "cpu" for name in names} if placement == "half" else placement
    imported = status_bytes("VmRSS")
    forget_peak()
    started = time.perf_counter()
    if loader == "load_model":
        model = load_model(folder, device_map, torch.float16, progress=False, workers=workers)
    else:
        model = ChatGLMForConditionalGeneration.from_pretrained(folder, device_map=device_map, dtype=torch.float16)
    seconds, peak = since(started), peak_bytes()
    kept = sum(value.nbytes for value in model.parameters() if value.device.type == "cpu")
    found = {
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "rss_growth_bytes": peak - before,
        "import_bytes": imported - before,
        "kept_on_cpu_bytes": kept,
        "rss_growth_less_kept_bytes": peak - before - kept,
        "tensors_checked": check_markers(model),
    }
    if loader == "load_model":
        report = model.load_report
        found |= {
            "read_bytes": report.read_bytes,
            "mb_per_s": round(report.read_bytes / seconds / 1e6),
            "shards": [[shard.name, round(shard.seconds, 3), round(shard.speed / 1e6)] for shard in report.shards],
        }
    return found


def status_bytes(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    """Start the kernel's record of the largest resident memory again; without that the record is of the whole life."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of the resident memory cannot be reset here: it covers the imports, too", file=sys.stderr)


def peak_bytes() -> int:
    """Largest resident memory since `forget_peak`, mapped file pages included."""
    return status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verify(folder: Path, files: list[Path], plain_cold: float) -> dict:
    """sha256 of all files, cold, beside plain reading; and once more from memory."""
    from glmhelpers.weights.manifest import MEMORY_NAME, checksums
    from glmhelpers.weights.verify import verify_weights

    sums, size = checksums(folder, [path.name for path in files])
    manifest = {"files": {path.name: {"size": path.stat().st_size, "sha256": sums[path.name]} for path in files}}
    (folder / MEMORY_NAME).unlink()
    share = set_cache(files, "cold")
    first, second = verify_weights(folder, manifest), verify_weights(folder, manifest)
    assert first.ok, str(first)
    assert second.bytes_read == 0
    return {
        "step": "verify",
        "cache": "cold",
        "cached_share": share,
        "seconds_quick": round(first.seconds_quick, 3),
        "seconds": round(first.seconds_checksums, 3),
        "mb_per_s": round(size / first.seconds_checksums / 1e6),
        "plain_seconds": plain_cold,
        "ratio": round(first.seconds_checksums / plain_cold, 2),
        "seconds_remembered": round(second.seconds_quick + second.seconds_checksums, 3),
    }


if __name__ == "__main__":
    main()
