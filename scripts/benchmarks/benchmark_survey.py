#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Cost of a survey: time and memory of `spectrafm predict FOLDER --output FOLDER` for Gaia XP spectra.

    python scripts/benchmarks/benchmark_survey.py --output survey  # 250,000 and 1,000,000 stars: JSON, table
    python scripts/benchmarks/benchmark_survey.py --output survey --stars 10000   # a try

A shard of synthetic spectra is written once and hard-linked under other names, to save disk space. The command runs in
a new process for each survey. Measured are the time from start to end, with loading of libraries and model, and peak
resident memory (VmHWM of Linux).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from benchmark import PIXELS, machine, write_json
from spectrafm_cli.arguments import Parser
from spectrafm_hf.data.schema import pixel_column
from spectrafm_hf.files import complete_file
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import SyntheticStars


MODEL = "spectrafm-base"
#: Stars per draw.
DRAWN = 1000
#: Seconds between two measurements of the memory.
PAUSE = 0.1


def write_shard(path: Path, n: int) -> None:
    """Synthetic stars with noise, all of them different."""
    stars, generator = SyntheticStars(Instrument.load("gaia-xp")), np.random.default_rng(0)
    tables = []
    for start in tqdm(range(0, n, DRAWN), desc="synthesizing", unit_scale=DRAWN, unit=" stars", delay=2):
        columns = stars.draw(min(DRAWN, n - start), generator)
        names = [str(start + i) for i in range(len(columns["flux"]))]
        pixels: dict[str, Any] = {name: pixel_column(columns[name]) for name in PIXELS}
        tables.append(pa.table({"object_id": names, "survey": ["gaia-xp"] * len(names), **pixels}))
    pq.write_table(pa.concat_tables(tables), path, row_group_size=DRAWN)


def peak_memory(process: int) -> float:
    """Greatest resident memory so far of a process, MB; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def survey(folder: Path, shard: Path, n_shards: int, batch_size: int) -> dict[str, Any]:
    """Predict this number of shards in a new process; returns time and memory."""
    spectra, labels = folder / "spectra", folder / "labels"
    spectra.mkdir()
    for number in range(n_shards):
        os.link(shard, spectra / f"{number:05d}.parquet")
    command = [sys.executable, "-m", "spectrafm_cli", "predict", str(spectra), "--model", MODEL]
    command += ["--output", str(labels), "--batch-size", str(batch_size)]
    load, start, peak = os.getloadavg()[0], time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            peak = max(peak, peak_memory(process.pid))
            time.sleep(PAUSE)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
    seconds, used = time.perf_counter() - start, ended[2]
    if process.returncode:
        raise ValueError(f"spectrafm predict: expected exit code 0, got {process.returncode}")
    n = n_shards * pq.read_metadata(shard).num_rows
    written = sum(pq.read_metadata(path).num_rows for path in labels.rglob("*.parquet"))
    if written != n:
        raise ValueError(f"{labels}: expected {n} rows, got {written}")
    return {
        "stars": n,
        "shards": n_shards,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "stars_per_s": round(n / seconds, 1),
        "peak_memory_mb": round(peak, 1),
        "load_before": round(load, 2),
    }


def as_markdown(content: dict[str, Any]) -> str:
    lines = [
        "| stars | shards | seconds | stars a second | stars a CPU second | resident memory, peak [MB] |",
        "|---|---|---|---|---|---|",
    ]
    for found in content["surveys"]:
        per_cpu = found["stars"] / found["cpu_seconds"]
        lines.append(
            f"| {found['stars']:,} | {found['shards']} | {found['seconds']:,.0f} | {found['stars_per_s']:,.0f} | "
            f"{per_cpu:,.0f} | {found['peak_memory_mb']:,.0f} |"
        )
    few, many = content["surveys"][0], content["surveys"][-1]
    if many["stars"] > few["stars"]:
        # From the difference of two surveys: without loading of libraries and model.
        further = (many["stars"] - few["stars"]) / (many["seconds"] - few["seconds"])
        lines += ["", f"Each further star: {1000 / further:.3f} ms, {further:,.0f} stars a second."]
    return "\n".join([*lines, "", f"{MODEL}, {content['machine']['threads']} threads."])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="benchmark_survey.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("survey"), metavar="DIR")
    parser.add_argument(
        "--stars", type=int, nargs="+", default=[250_000, 1_000_000], metavar="N", help="default: 250000 1000000"
    )
    parser.add_argument("--shard", type=int, default=10_000, metavar="N", help="stars of a shard (default: 10000)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="as of spectrafm (default: 128)")
    arguments = parser.parse_args(argv)
    if wrong := [n for n in arguments.stars if n < 1 or n % arguments.shard]:
        parser.error(f"--stars: expected multiples of the {arguments.shard} of a shard, got {wrong}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    surveys = []
    with tempfile.TemporaryDirectory(prefix="spectrafm-") as folder:
        shard = Path(folder, "shard.parquet")
        write_shard(shard, arguments.shard)
        for n in sorted(arguments.stars):
            with tempfile.TemporaryDirectory(dir=folder) as inside:
                surveys.append(survey(Path(inside), shard, n // arguments.shard, arguments.batch_size))
    content = {"machine": machine(), "batch_size": arguments.batch_size, "surveys": surveys}
    write_json(arguments.output / "survey.json", content)
    text = as_markdown(content)
    with complete_file(arguments.output / "survey.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
