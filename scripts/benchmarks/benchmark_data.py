"""Speed and memory of writing and reading a data set of spectra.

Spectra of 7,514 pixels with random flux and noise, as pyarrow tables, are written by the writer of all builders and
read through `datasets.load_dataset(streaming=True)` as NumPy batches. Each figure comes from a new process, for N and
for 4 N spectra: memory is constant if its peak is the same.
On a loaded machine, use the spectra per CPU second.

    python scripts/benchmarks/benchmark_data.py [--n 8000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


PIXELS = 7514
#: Spectra in a table for the writer, and in a batch from the reader.
TABLE, BATCH = 250, 64
WANTED = {"written": 2000, "read": 5000}


def tables(n: int) -> Iterator[tuple[str, pa.Table]]:
    """One table repeatedly, with new names, because random numbers are slow."""
    from spectrafm_hf.data.schema import pixel_column

    random = np.random.default_rng(0)
    flux = random.normal(1, 0.05, (TABLE, PIXELS)).astype(np.float32)
    columns: dict[str, Any] = {
        "survey": ["benchmark"] * TABLE,
        "wavelength": pixel_column(np.broadcast_to(10 ** (4.179 + 6e-6 * np.arange(PIXELS)), flux.shape)),
        "flux": pixel_column(flux),
        "flux_error": pixel_column(random.uniform(0.005, 0.02, flux.shape)),
        "mask": pixel_column(random.random(flux.shape) < 0.02),
        **{name: random.normal(0, 1, TABLE).astype(np.float32) for name in ("snr", "teff")},
        "teff_err": np.full(TABLE, 0.1, np.float32),
    }
    for start in range(0, n, TABLE):
        size = min(TABLE, n - start)
        names = pa.array([f"star {start + i}" for i in range(size)])
        yield "train", pa.table(columns).slice(0, size).append_column("object_id", names)


def write(folder: Path, n: int) -> int:
    from spectrafm_hf.data.building import Card, write_dataset
    from spectrafm_hf.data.schema import spectrum_features

    card = Card(
        title="Benchmark",
        description="Noise.",
        command="scripts/benchmarks/benchmark_data.py",
        license="cc0-1.0",
        source="",
    )
    settings = {"builder": "benchmark", "n": n}
    features = spectrum_features(["teff"])
    write_dataset(folder, tables(n), features=features, card=lambda: card, settings=settings, shard_rows=2000)
    return n


def read(folder: Path, n: int) -> int:
    """An epoch of batches, as a training on one device has it; pyarrow decodes on all processors."""
    from datasets import load_dataset

    data = load_dataset(str(folder), split="train", streaming=True).with_format("numpy")
    return sum(len(batch["flux"]) for batch in data.iter(batch_size=BATCH))


def measure(what: str, folder: Path, n: int) -> dict[str, Any]:
    """Run one part in a process of its own."""
    command = [sys.executable, __file__, "--part", what, "--n", str(n), str(folder)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def run_part(what: str, folder: Path, n: int) -> None:
    import spectrafm_hf.data.building  # noqa: F401  # imports take seconds and are not measured

    usages = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

    def processor_seconds() -> float:
        return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in usages)

    start, busy = time.perf_counter(), processor_seconds()
    count = {"write": write, "read": read}[what](folder, n)
    seconds, busy = time.perf_counter() - start, processor_seconds() - busy
    peak = max(resource.getrusage(who).ru_maxrss for who in usages) / 1024
    print(json.dumps({"spectra": count, "seconds": seconds, "processor_seconds": busy, "peak_mb": peak}))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8000, help="number of spectra; four times as many for the memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    parser.add_argument("--part", choices=("write", "read"), help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", type=Path, help="folder of the data sets (default: a temporary one)")
    arguments = parser.parse_args(argv)
    if arguments.part:
        run_part(arguments.part, arguments.folder, arguments.n)
        return 0
    figures = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for n in (arguments.n, 4 * arguments.n):
            folder = Path(temporary) / str(n)
            for part, name in (("write", "written"), ("read", "read")):
                result = measure(part, folder, n)
                result |= {"part": name, "per_second": n / result["seconds"], "wanted_per_second": WANTED[name]}
                figures.append(result)
            size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    print(f"{'':8} {'spectra':>8} {'a second':>9} {'wanted':>7} {'a processor second':>19} {'peak MB':>8}")
    for figure in figures:
        print(
            f"{figure['part']:8} {figure['spectra']:8,} {figure['per_second']:9,.0f} {figure['wanted_per_second']:7,} "
            f"{figure['spectra'] / figure['processor_seconds']:19,.0f} {figure['peak_mb']:8,.0f}"
        )
    print(f"{PIXELS:,} pixels, {size / (4 * arguments.n) / 1000:.0f} kB a spectrum on disk")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
