#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare spectra from Gaia XP coefficients with GaiaXPy: flux, errors and speed.

    python scripts/benchmarks/compare_gaiaxpy.py XP_CONTINUOUS_RAW.fits --output docs/gaia.md       # 20,000 stars
    python scripts/benchmarks/compare_gaiaxpy.py XP_CONTINUOUS_RAW.fits --stars 500                 # a try

The file is from the tests of GaiaXPy (any other from the archive works). Its sources, with both bands and without BP or
RP, are written in every format and compared with `gaiaxpy.calibrate`. For the speed, `--stars` stars with different
numbers of as many digits are made from them. `gaiaxpy.calibrate` alone, and this package from the file to a table of
labels, run in turn, each in a new process with one thread. Measured are CPU time (without imports and loading the
model), which other programs affect little, and peak resident memory. GaiaXPy cannot read .csv.gz and gets uncompressed
files. It uses one core; in a survey this package runs one process on each core.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits
from astropy.io.votable import from_table
from astropy.table import Table
from benchmark_survey import peak_memory

from benchmark import machine, write_json
from spectrafm_cli.arguments import Parser
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.readers.gaia_continuous import COLUMNS
from spectrafm_hf.data.xp_basis import BANDS, xp_basis


Row = dict[str, Any]
MODEL = "spectrafm-base"
ALL_STARS = 220_000_000
FORMATS = ("csv", "ecsv", "csv.gz", "fits", "xml", "parquet")
TIMED = ("csv.gz", "fits", "parquet")
#: Format of the same stars for `gaiaxpy.calibrate`.
FOR_GAIAXPY = {"csv.gz": "csv", "fits": "fits"}
DRAWN = 500  # stars per batch
CORES = 2


# --------------------------------------------------------------------------------------------------------------- stars


def sources(path: Path) -> list[Row]:
    """Rows of a FITS file of the archive: a scalar or an array in each column."""
    table = Table.read(path)
    return [{name: np.asarray(row[name])[()] for name in table.colnames} for row in table]


def without(row: Row, band: str) -> Row:
    """A source without a spectrum in one band."""
    return {name: None if name.startswith(f"{band}_") else value for name, value in row.items()}


def drawn(rows: list[Row], n: int, seed: int = 0) -> Iterator[Row]:
    """Stars like these with different numbers; correlations are reduced, so that the matrices stay valid."""
    generator = np.random.default_rng(seed)
    for i in range(n):
        star = dict(rows[i % len(rows)], source_id=int(rows[i % len(rows)]["source_id"]) + i)
        shrunk = np.float32(1 - 0.01 * generator.random())
        for name in COLUMNS:
            value = star[name]
            if name.endswith("coefficients"):
                star[name] = value * (1 + 0.01 * generator.normal(size=value.size))
            elif name.endswith("errors"):
                star[name] = value * generator.uniform(0.9, 1.1, value.size).astype(np.float32)
            else:
                star[name] = value * shrunk
        yield star


# ------------------------------------------------------------------------------------------------------------- writing


def written(value: Any) -> str:
    if value is None:
        return "null"
    # A float32 has fewer digits than a float64; as the archive, that of the column.
    return "(" + ", ".join(map(str, value)) + ")" if np.ndim(value) else str(value)


def write_text(rows: Iterator[Row] | list[Row], path: Path) -> None:
    with contextlib.ExitStack() as stack:
        if path.suffix == ".gz":
            stream: Any = stack.enter_context(gzip.open(path, "wt", newline="", compresslevel=6))
        else:
            stream = stack.enter_context(path.open("w", newline=""))
        writer = None
        for row in rows:
            if writer is None:
                if path.suffix == ".ecsv":
                    stream.write("# %ECSV 1.0\n# ---\n# delimiter: ','\n")
                writer = csv.DictWriter(stream, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow({name: written(value) for name, value in row.items()})


def column_of(rows: list[Row], name: str) -> Any:
    return [row[name] for row in rows]


def table_of(rows: list[Row]) -> fits.BinTableHDU:
    columns = []
    for name in rows[0]:
        values = column_of(rows, name)
        kind = "E" if "error" in name or "correlation" in name else "D"
        if name in COLUMNS:
            arrays = np.empty(len(rows), object)
            arrays[:] = [np.zeros(0) if value is None else value for value in values]
            columns.append(fits.Column(name, f"P{kind}()", array=arrays))
            continue
        known = next(value for value in values if value is not None)
        numbers = np.array([np.zeros_like(known) if value is None else value for value in values])
        columns.append(fits.Column(name, "K" if numbers.dtype.kind in "iub" else "E", array=numbers))
    return fits.BinTableHDU.from_columns(columns)


def parquet_of(rows: list[Row]) -> pa.Table:
    return pa.table({name: pa.array(column_of(rows, name)) for name in rows[0]})


def write(rows: list[Row], path: Path) -> Path:
    if path.suffix in (".csv", ".gz", ".ecsv"):
        write_text(rows, path)
    elif path.suffix == ".parquet":
        pq.write_table(parquet_of(rows), path)
    elif path.suffix == ".fits":
        table_of(rows).writeto(path)
    else:
        from_table(Table.read(table_of(rows))).to_xml(str(path))
    return path


def write_stars(rows: list[Row], n: int, folder: Path) -> None:
    """The same stars in each format that is timed; text is decompressed for GaiaXPy."""
    write_text(drawn(rows, n), folder / "stars.csv")
    with (folder / "stars.csv").open("rb") as text, gzip.open(folder / "stars.csv.gz", "wb", 6) as packed:
        while block := text.read(1 << 22):
            packed.write(block)
    stars = list(drawn(rows, n))
    table_of(stars).writeto(folder / "stars.fits")
    with pq.ParquetWriter(folder / "stars.parquet", parquet_of(stars[:1]).schema) as writer:
        for start in range(0, n, DRAWN):
            writer.write_table(parquet_of(stars[start : start + DRAWN]))


# ------------------------------------------------------------------------------------------------------------ equality


def calibrated(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Flux and error of GaiaXPy."""
    import pandas as pd
    from gaiaxpy import calibrate

    found, _ = calibrate(pd.DataFrame(rows), save_file=False)
    return np.stack(found["flux"].to_list()), np.stack(found["flux_error"].to_list())


def equality(rows: list[Row], folder: Path) -> list[dict[str, Any]]:
    """Greatest relative differences from GaiaXPy, by format and by what is missing."""
    kinds = {"both": rows, **{f"no {band.upper()}": [without(row, band) for row in rows] for band in BANDS}}
    found = []
    for kind, stars in kinds.items():
        # GaiaXPy takes a table only if some star has the band; of those, the first are compared.
        own_flux, own_error = (values[: len(stars)] for values in calibrated([*stars, *rows]))
        for format in FORMATS:
            path = write([*stars, *rows], folder / f"{kind.replace(' ', '-')}.{format}")
            read = list(read_spectra([path]))[: len(stars)]
            line: dict[str, Any] = {"format": format, "bands": kind, "pixels": int(np.isfinite(own_flux).sum())}
            for name, own in (("flux", own_flux), ("flux_error", own_error)):
                ours = np.stack([row[name].astype(float) * row["medflux"] for row in read])
                good = np.isfinite(own)
                if not np.array_equal(good, ~np.stack([row["mask"] for row in read])):
                    raise ValueError(f"{path.name}: expected pixels where GaiaXPy has them, got others")
                line[name] = float(np.max(np.abs(ours[good] / own[good] - 1)))
            found.append(line)
    return found


# --------------------------------------------------------------------------------------------------------------- speed


def timed(what: str, path: Path) -> dict[str, float]:
    """Time and memory in this process."""
    if what == "calibrate":
        from gaiaxpy import calibrate

        def work() -> int:
            return len(calibrate(str(path), save_file=False)[0])
    elif what == "read":
        xp_basis()

        def work() -> int:
            return sum(1 for _ in read_spectra([path]))
    else:
        from spectrafm_hf import bundled
        from spectrafm_hf.inference.survey import ShardPredictor, list_shards
        from spectrafm_hf.models import SpectraFMForPrediction, SpectraFMTokenizer

        xp_basis()
        model = SpectraFMForPrediction.from_pretrained(bundled(MODEL))
        predictor = ShardPredictor(model, SpectraFMTokenizer.from_pretrained(bundled(MODEL)), path.parent / "labels")
        (shard,) = list_shards([path])

        def work() -> int:
            predictor(shard)
            return int(pq.read_metadata(predictor.path(shard)).num_rows)

    before = peak_memory(os.getpid())
    start, cpu = time.perf_counter(), time.process_time()
    n = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = {"memory_mb": peak_memory(os.getpid()), "memory_before_mb": before}
    return {"stars": n, "seconds": seconds, "cpu_seconds": cpu, **memory}


def measured(what: str, path: Path) -> dict[str, Any]:
    """[`timed`] in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, "--timed", what, str(path)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    run = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **threads}
    )
    return dict(json.loads(run.stdout.splitlines()[-1]))


def speed(folder: Path, formats: list[str], rounds: int) -> list[dict[str, Any]]:
    """Run all in turn; the best round of each."""
    own = {format: FOR_GAIAXPY.get(format, "fits") for format in formats}  # that GaiaXPy reads
    runs = [("calibrate", format, format) for format in dict.fromkeys(own.values())]
    runs += [(what, format, format) for format in formats for what in ("read", "labels")]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(rounds):
        for what, format, suffix in runs:
            found = measured(what, folder / f"stars.{suffix}")
            known = best.get((what, format))
            if known is None or found["cpu_seconds"] < known["cpu_seconds"]:
                best[what, format] = found
    lines = []
    for (what, format), found in best.items():
        rate = found["stars"] / found["cpu_seconds"]
        alone = best["calibrate", format if what == "calibrate" else own[format]]
        cores = 1 if what == "calibrate" else CORES
        lines.append(
            {
                "what": what,
                "format": format,
                **found,
                "stars_per_s": cores * rate,
                "times_calibrate": cores * rate * alone["cpu_seconds"] / alone["stars"],
                "days_for_all": ALL_STARS / (cores * rate) / 86400,
            }
        )
    return lines


# -------------------------------------------------------------------------------------------------------------- report

INTRODUCTION = """\
# Coefficients of Gaia XP spectra, compared with GaiaXPy

Made by `python scripts/benchmarks/compare_gaiaxpy.py XP_CONTINUOUS_RAW.fits --output docs/gaia.md` with
GaiaXPy {version}.

Largest relative differences from `gaiaxpy.calibrate`, for the sources in the tests of GaiaXPy, in every format, with
both bands and without one of them. This package stores single precision.
"""
SPEED = """\
{stars:,} stars with different numbers, made from these sources; each run in a new process with one thread. Speeds are
per CPU time, without imports and loading the model. GaiaXPy uses one core; in a survey this package runs one process on
each core, so its speeds are those of one process times {cores}. GaiaXPy cannot read .csv.gz and Parquet: it gets the
first uncompressed, and the second is compared with FITS. Memory is the peak of a process with Python and all libraries.
Load of the machine at the start: {load:.1f}.
"""


def report(found: dict[str, Any]) -> str:
    out = io.StringIO()
    print(INTRODUCTION.format(version=found["gaiaxpy"]), file=out)
    print("| format | bands | flux | error |\n|---|---|---|---|", file=out)
    for line in found["equality"]:
        print(f"| {line['format']} | {line['bands']} | {line['flux']:.1e} | {line['flux_error']:.1e} |", file=out)
    print("\n" + SPEED.format(stars=found["stars"], cores=CORES, load=found["load"]), file=out, end="")
    heads = ("", "file", "stars/s on two cores", "times calibrate", "memory, MB", "days for 220 million")
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", file=out)
    names = {"calibrate": "`gaiaxpy.calibrate` alone", "read": "spectra read", "labels": "**labels written**"}
    for line in found["speed"]:
        file = line["format"]
        numbers = f"{line['stars_per_s']:,.0f} | {line['times_calibrate']:.1f}"
        numbers += f" | {line['memory_mb']:,.0f} | {line['days_for_all']:.2f}"
        print(f"| {names[line['what']]} | {file} | {numbers} |", file=out)
    return out.getvalue()


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="FITS file of XP_CONTINUOUS_RAW spectra")
    parser.add_argument("--output", type=Path, help="a Markdown file; default: the terminal")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--stars", type=int, default=20_000)
    parser.add_argument("--formats", nargs="+", choices=TIMED, default=list(TIMED), help="formats that are timed")
    parser.add_argument("--rounds", type=int, default=2, help="rounds in which all run in turn (default: 2)")
    if sys.argv[1:2] == ["--timed"]:
        print(json.dumps(timed(sys.argv[2], Path(sys.argv[3]))))
        return 0
    arguments = parser.parse_args()
    rows = sources(arguments.source)
    with tempfile.TemporaryDirectory(prefix="spectrafm-") as folder:
        found: dict[str, Any] = {
            "machine": machine(),
            "gaiaxpy": version("gaiaxpy"),
            "equality": equality(rows, Path(folder)),
        }
        write_stars(rows, arguments.stars, Path(folder))
        found["load"], found["stars"] = os.getloadavg()[0], arguments.stars
        found["speed"] = speed(Path(folder), arguments.formats, arguments.rounds)
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.output:
        arguments.output.write_text(report(found), encoding="utf-8")
    else:
        print(report(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
