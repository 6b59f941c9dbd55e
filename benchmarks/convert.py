"""Rows per second and memory from JSON files to tokens on disk: this project's way and the way of 2023, one run.

    python benchmarks/convert.py                    both ways on the made-up corpus of full size (about 2 minutes)
    python benchmarks/convert.py --rows 5000        a smaller corpus
    python benchmarks/convert.py --source FOLDER    other files
    python benchmarks/convert.py --real             the real files, where they are at hand (`real_files.py`); ids and
                                                    calls of the tokenizer beside the published encoder's

Each way runs in a process of its own with the same tokenizer and prints one JSON line; a last line compares them.
`peak_rss_bytes` counts everything, the imports of torch, transformers and datasets included. `cpu_s` is the time the
processor worked, which other programs on the machine disturb less than `seconds`. Rows count once they are encoded;
those that are then left out, as longer than the model can read, stand in `rows_too_long`.

The way of 2023: pandas reads each file and failures are passed over, all rows are joined and shuffled, written as CSV
in chunks of 666 rows, loaded with load_dataset("csv"), and the tokenizer is called once a row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CSV_ROWS = 666


def main() -> None:
    """Run both ways, each in its own process, and compare them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=82_561)
    options.add_argument("--source", type=Path, help="folder with the data set; made up if left out")
    options.add_argument("--tokenizer", type=Path, default=ROOT / "tests" / "reference" / "tokenizer")
    options.add_argument("--real", action="store_true", help="the real files, from the folder in GLM_REAL_DATA")
    options.add_argument("--repeats", type=int, default=1, help="runs of each way, in turns; the fastest are compared")
    options.add_argument("--way", choices=["ours", "2023"], help="one way only, in this process")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if chosen.way:
            print(json.dumps(measure(chosen, Path(work))), flush=True)
            return
        if chosen.real:
            from benchmarks.real_files import real_files

            chosen.source, chosen.tokenizer = real_files(Path(work))
        if chosen.source is None:
            from benchmarks.corpus import write_corpus

            chosen.source = Path(work, "corpus")
            whole = write_corpus(chosen.source, chosen.rows)
            print(json.dumps({"corpus_rows": chosen.rows, "whole_rows": whole}), flush=True)
        runs: dict[str, list[dict]] = {"ours": [], "2023": []}
        for _ in range(chosen.repeats):
            for way, done in runs.items():
                done.append(_in_process(way, chosen))
        ours, old = (min(done, key=lambda run: run["seconds"]) for done in runs.values())
        compared = {
            "rows_per_s_ratio": round(ours["rows_per_s"] / old["rows_per_s"], 2),
            "rows_per_cpu_s_ratio": round(ours["rows"] / ours["cpu_s"] / (old["rows"] / old["cpu_s"]), 2),
            "rows_that_only_ours_kept": ours["rows"] - old["rows"],
        }
        print(json.dumps(compared), flush=True)
        if chosen.real:
            print(json.dumps(against_published(chosen, Path(work))), flush=True)


def _in_process(way: str, chosen: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--way", way, "--source", chosen.source, "--tokenizer", chosen.tokenizer]
    command += ["--real"] * chosen.real
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    line = done.stdout.splitlines()[-1]
    print(line, flush=True)
    return json.loads(line)


def against_published(chosen: argparse.Namespace, work: Path) -> dict:
    """The real rows once more: ids and calls of our tokenizer beside those of the published encoder."""
    from benchmarks.real_files import compare_calls, compare_ids
    from glmhelpers.data.convert import convert_alpaca
    from thuglm import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer.from_pretrained(chosen.tokenizer)
    rows = convert_alpaca(chosen.source, work / "rows.jsonl").output
    return {**compare_ids(rows, tokenizer), **compare_calls(rows, tokenizer)}


def measure(chosen: argparse.Namespace, work: Path) -> dict:
    """Time one way, imports left out, and its peak memory, imports counted."""
    from thuglm import ChatGLMTokenizer

    way, tokenizer = chosen.way, ChatGLMTokenizer.from_pretrained(chosen.tokenizer)
    run = ours if way == "ours" else way_of_2023
    if way == "2023" and chosen.real:
        from benchmarks.real_files import Published

        tokenizer = Published(tokenizer)
    import datasets  # noqa: F401 - imports are not timed
    import pandas  # noqa: F401

    from glmhelpers.data.convert import convert_alpaca  # noqa: F401
    from glmhelpers.tokens.encode import encode_file  # noqa: F401

    started, cpu = time.perf_counter(), time.process_time()
    result = run(chosen.source, tokenizer, work)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "way": way,
        **result,
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu, 2),
        "rows_per_s": round(result["rows"] / seconds, 1),
        "peak_rss_bytes": peak_rss(),
        "load": os.getloadavg()[0],
    }


def ours(source: Path, tokenizer, work: Path) -> dict:
    """convert_alpaca and encode_file."""
    from glmhelpers.data.convert import convert_alpaca
    from glmhelpers.tokens.encode import encode_file, token_report

    report = convert_alpaca(source, work / "train.jsonl")
    tokens = token_report(encode_file(work / "train.jsonl", tokenizer))
    return {
        "rows": tokens.examples,
        "rows_too_long": sum(tokens.dropped.values()),
        "rows_found": report.rows,
        "rows_valid": report.rows_valid,
        "rows_rejected": sum(report.rejected.values()),
        "tokens": tokens.tokens,
    }


def way_of_2023(source: Path, tokenizer, work: Path) -> dict:
    """As the notebook that this course grew from did it."""
    import datasets
    import pandas

    datasets.disable_progress_bars()
    frames, passed_over = [], 0
    for path in sorted(source.rglob("*.json")):
        try:
            frames.append(pandas.read_json(path))
        except ValueError:
            passed_over += 1
    frame = pandas.concat(frames).sample(frac=1, random_state=0)
    chunks = work / "csv"
    chunks.mkdir()
    for number, start in enumerate(range(0, len(frame), CSV_ROWS)):
        frame[start : start + CSV_ROWS].to_csv(chunks / f"{number}.csv", index=False)
    loaded = datasets.load_dataset(
        "csv", data_files=sorted(map(str, chunks.glob("*.csv"))), split="train", cache_dir=str(work / "cache")
    )

    def encode(row: dict) -> dict:
        prompt = f"Instruction: {row['instruction']}\n"
        if row["input"]:
            prompt += f"Input: {row['input']}\n"
        ids = tokenizer.encode(prompt + "Answer: ", str(row["output"]))
        start = ids.index(tokenizer.bos_token_id) + 1
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}

    encoded = loaded.map(encode, remove_columns=loaded.column_names)
    return {"rows": len(encoded), "files_passed_over": passed_over, "tokens": sum(map(len, encoded["input_ids"]))}


def peak_rss() -> int:
    """Most bytes of memory this process has held (the kernel's own mark)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line; peak memory is measured on Linux only")


if __name__ == "__main__":
    main()
