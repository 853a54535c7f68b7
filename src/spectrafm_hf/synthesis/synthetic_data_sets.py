# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets of synthetic stars, written by several processes, with their card."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..data.building import SPLITS, Card, Shard, build_folder, plan_shards, write_card, write_shard
from ..data.schema import LABEL_UNITS, PIXEL_COLUMNS, pixel_column
from ..models import SpectrumEmulator
from ..statistics import robust_scatter
from .instruments import Instrument, instrument_names
from .labels import LABEL_NAMES
from .synthetic import BATCH, LABELS, _Stars, check_seed


CITATIONS = (
    "Gustafsson et al. 2008, A&A 486, 951 (MARCS)",
    "Plez 2012, ascl:1205.004 (Turbospectrum)",
    "Placco et al. 2021, RNAAS 5, 92 (linemake)",
    "Gordon et al. 2023, ApJ 950, 86 (extinction curve, where there is extinction)",
    "Koblischke & Bovy 2024, arXiv:2411.04750 (SpectraFM)",
)


#: Bits that are kept of the 23 of a float32: flux moves by at most 6e-5 (at S/N 500 the noise is 30 times that), errors
#: by at most 0.4 %. The other bits are noise, which no compression gets rid of and which doubles the size of a file.
FLUX_BITS, ERROR_BITS = 13, 7


def build_synthetic(
    out_dir: str | os.PathLike[str],
    n: int,
    instrument: str | os.PathLike[str] | Instrument,
    *,
    emulator: str | os.PathLike[str] | SpectrumEmulator | None = None,
    seed: int = 0,
    splits: tuple[float, float, float] = (90, 5, 5),
    label_ranges: Mapping[str, tuple[float, float]] | None = None,
    shard_rows: int = 2000,
    workers: int = 1,
    overwrite: bool = False,
    pictures: Callable[[Path, dict[str, NDArray[Any]], dict[str, NDArray[Any]]], None] | None = None,
) -> Path:
    """
    Build a data set of synthetic stars: Parquet files of up to three splits and a data card.

    Every shard follows from the seed, its split and its number alone. The finished shards of a killed run are in a
    hidden folder beside `out_dir`, where the next run with the same settings resumes.

    Parameters
    ----------
    out_dir : path
        Folder to make. It appears under this name only when it is complete.
    n : int
        Number of stars in all splits.
    instrument, emulator, label_ranges
        See [`SyntheticStars`].
    seed : int
    splits : (train, validation, test)
        Their shares, in any unit; a split of 0 is left out.
    shard_rows : int
        Stars in a Parquet file.
    workers : int
        Processes. With more than one, a script that calls this needs the usual `if __name__ == "__main__":`.
    overwrite : bool
        Build again where `out_dir` holds a complete build.
    pictures : callable, optional
        Draws `labels.png` and `spectra.png` of the card: gets the folder, all labels, and 500 more stars as columns,
        with their flux before noise as `clean`.

    Returns
    -------
    pathlib.Path
        `out_dir`. A complete build that is there already, with the same settings, is kept.

    Raises
    ------
    ValueError
        Naming field, expectation and value: of an argument, of the instrument file, of a wavelength or label range that
        the emulator does not cover, or of `out_dir` if it has other content.
    """
    for name, number in (("n", n), ("shard_rows", shard_rows), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    check_seed(seed)
    shards = plan_shards(_sizes(n, splits), shard_rows)
    stars = _Stars(instrument, emulator, label_ranges)
    settings = {
        "builder": "synthetic",
        "n": n,
        "instrument": stars.instrument.name,
        "emulator": Path(stars.emulator.name_or_path or "unnamed").name,
        "fingerprint": stars.fingerprint(),
        "seed": seed,
        "splits": list(splits),
        "label_ranges": {name: [float(low), float(high)] for name, (low, high) in stars.ranges.items()},
        "shard_rows": shard_rows,
    }

    def fill(folder: Path) -> None:
        missing = [shard for shard in shards if not (folder / "data" / shard.name).exists()]
        _write_shards(stars, folder / "data", missing, seed, workers, n)
        sample = stars.draw(500, np.random.default_rng([seed, len(SPLITS) + 1]))
        if pictures:
            table = pq.read_table(folder / "data", columns=list(LABELS))
            pictures(folder, {name: table[name].to_numpy() for name in LABELS}, sample)
        text = yaml.safe_dump(dict(stars.instrument.settings), sort_keys=False, default_flow_style=None, width=115)
        (folder / "instrument.yaml").write_text(text, encoding="utf-8")
        write_card(folder, stars.features, _card(stars, settings, sample, pictured=pictures is not None))

    return build_folder(out_dir, settings, fill, overwrite=overwrite)


def _sizes(n: int, splits: tuple[float, float, float]) -> dict[str, int]:
    if len(splits) != len(SPLITS) or min(splits) < 0 or not 0 < (total := sum(splits)) < np.inf:
        raise ValueError(f"splits: expected three shares of {SPLITS}, none negative, got {tuple(splits)}")
    ends = [round(n * sum(splits[:i]) / total) for i in range(len(SPLITS) + 1)]
    return dict(zip(SPLITS, np.diff(ends).tolist(), strict=True))


_worker_stars: _Stars


def _start_worker(stars: _Stars) -> None:
    """In a process of its own: Ctrl-C is the parent's business, and if that is killed, so is this."""
    global _worker_stars
    _worker_stars = stars
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _write_in_worker(folder: Path, shard: Shard, seed: int) -> int:
    return _write_shard(_worker_stars, folder, shard, seed)


def _write_shards(stars: _Stars, folder: Path, shards: list[Shard], seed: int, workers: int, total: int) -> None:
    done = total - sum(shard.stop - shard.start for shard in shards)
    with tqdm(
        total=total, initial=done, desc="making synthetic stars", unit=" stars", delay=2, disable=None
    ) as progress:
        if workers == 1 or len(shards) < 2:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in a worker: the order of a sum shows in the last digit
            try:
                for shard in shards:
                    progress.update(_write_shard(stars, folder, shard, seed))
            finally:
                torch.set_num_threads(threads)
            return
        # Forking a process that torch has threads in can hang.
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(shards)), context, _start_worker, (stars,))
        try:
            tasks = [pool.submit(_write_in_worker, folder, shard, seed) for shard in shards]
            for task in concurrent.futures.as_completed(tasks):
                progress.update(task.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(stars: _Stars, folder: Path, shard: Shard, seed: int) -> int:
    """Write one file; the number of its stars."""
    generator = np.random.default_rng([seed, SPLITS.index(shard.split), shard.number])
    n_rows = shard.stop - shard.start

    def tables() -> Iterator[pa.Table]:
        for start in range(0, n_rows, BATCH):
            columns = stars.draw(min(BATCH, n_rows - start), generator)
            first = f"{stars.survey}-{seed}-{shard.split}-{shard.number}"
            columns["object_id"] = np.array([f"{first}-{start + i}" for i in range(len(columns["snr"]))])
            columns["survey"] = np.full(len(columns["snr"]), stars.survey)
            yield _table(columns, stars.features.arrow_schema)

    write_shard(folder / shard.name, tables(), stars.features)
    return n_rows


def _table(columns: Mapping[str, NDArray[Any]], schema: pa.Schema) -> pa.Table:
    rounded = {"flux": _round(columns["flux"], FLUX_BITS), "flux_error": _round(columns["flux_error"], ERROR_BITS)}
    arrays = []
    for field in schema:
        values = rounded.get(field.name, columns[field.name])
        arrays.append(pixel_column(values) if field.name in PIXEL_COLUMNS else pa.array(values, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _round(values: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """To the nearest float32 whose last 23 - `bits` bits are 0."""
    dropped = 23 - bits
    whole = np.ascontiguousarray(values, np.float32).view(np.uint32) + np.uint32(1 << (dropped - 1))
    return (whole & np.uint32(0xFFFFFFFF ^ ((1 << dropped) - 1))).view(np.float32)


def _card(stars: _Stars, settings: Mapping[str, Any], sample: Mapping[str, NDArray[Any]], pictured: bool) -> Card:
    instrument = stars.instrument
    deviation = ((sample["flux"] - sample["clean"]) / sample["flux_error"]).ravel()
    ranges = "\n".join(
        f"| `{name}` | {low:g} | {high:g} | {LABEL_UNITS[name]} |" for name, (low, high) in stars.ranges.items()
    )
    if set(stars.ranges) > set(LABEL_NAMES):
        drawn = """`spectrafm_hf.synthesis.labels.draw_optical_labels`: two fifths follow the stars of APOGEE DR17
flattened in density, a fifth each is hot, cool and metal-poor. Elements scatter more"""
    else:
        drawn = """`spectrafm_hf.synthesis.labels.draw_labels`, which follows the stars of APOGEE DR17 flattened in
density. Elements scatter more"""
    labels = f"""Drawn by {drawn}, and more independently, than in real stars. This is no model of the Galaxy.

Limits:

| label | lowest | highest | unit |
|---|---|---|---|
{ranges}"""
    observation = "\n".join(f"- {line}" for line in _observation(stars))
    observation += f"""

The robust standard deviation of (flux - noiseless flux) / flux_error is **{robust_scatter(deviation):.4f}**
({deviation.size:,} pixels of 500 more stars of this kind; 1.4826 MAD).

Files hold flux rounded to {FLUX_BITS} and errors to {ERROR_BITS} bits after the leading one: steps of at most
0.012 % of the flux and 0.8 % of the error, far below the noise, for half the size."""
    if pictured:
        labels = "![Distribution of the labels](labels.png)\n\n" + labels
        observation += "\n\n![Spectra and their noise](spectra.png)"
    in_units = {"median": "over its median", "continuum": "over the continuum"}.get(
        instrument.normalisation, stars.emulator.config.flux_unit or "as the emulator gives it"
    )
    return Card(
        title=f"Synthetic stellar spectra: {instrument.name}",
        description=f"""{instrument.description}

Labels are drawn, an emulator of radiative transfer (Turbospectrum, MARCS model atmospheres) turns them into spectra,
and the instrument `{instrument.name}` (`instrument.yaml`) observes those. Every shard follows from the seed, its
split and its number.""",
        command=_command(stars, settings),
        license="cc-by-4.0",
        tags=["synthetic"],
        split="Every star is drawn independently, so that a split is a part at random.",
        sections={"Labels": labels, "Observation": observation},
        columns={
            "object_id": "instrument, seed, split, shard and number of the star",
            "survey": f"`{stars.survey}`",
            "wavelength": "Angstrom in vacuum, rest frame; the same in every row",
            "flux": f"with noise, {in_units}",
            "flux_error": "one standard deviation of the noise in `flux`",
            "snr": "median of noiseless flux / error over all pixels",
            "alpha_m": "dex; mean of o_fe, mg_fe, si_fe, ca_fe, ti_fe",
            **{f"{name}_err": "0: the label is exact" for name in LABELS},
            "ak_targ": "mag; extinction in K, 0.1066 A(V)",
        },
        flaws=[
            "The spectra are as good as their synthesis: LTE, one-dimensional atmospheres with solar-scaled "
            "composition, line lists with errors of their own, and the error of the emulator, which its card states.",
            "No rotation, no radial velocity (all is at rest), no binaries, no emission, no telluric residuals, no bad "
            "pixels.",
            "Errors are known exactly and depend on the noiseless flux; those of real spectra are estimates.",
        ],
        source=f"Emulator `{settings['emulator']}`; SHA-256 of its weights and of the instrument: "
        f"`{settings['fingerprint']}`.",
        citations=CITATIONS,
    )


def _command(stars: _Stars, settings: Mapping[str, Any]) -> str:
    instrument = settings["instrument"] if settings["instrument"] in instrument_names() else "DIR/instrument.yaml"
    config = stars.emulator.config
    full = dict(zip(config.label_names, zip(config.label_minimum, config.label_maximum, strict=True), strict=True))
    narrowed = [
        f" --range {name} {low} {high}" for name, (low, high) in stars.ranges.items() if full[name] != (low, high)
    ]
    parts = {name: settings[name.replace("-", "_")] for name in ("n", "emulator", "seed", "shard-rows")}
    options = "".join(f" --{name} {value}" for name, value in parts.items())
    splits = " ".join(f"{share:g}" for share in settings["splits"])
    return f"spectrafm data synthetic --out DIR --instrument {instrument}{options} --splits {splits}{''.join(narrowed)}"


def _observation(stars: _Stars) -> Iterator[str]:
    """The simulated observation, in sentences."""
    instrument, own = stars.instrument, stars.instrument.wavelength
    ends = ", ".join(f"{grid[0]:,.1f}-{grid[-1]:,.1f}" for grid in instrument.detectors)
    yield f"{own.size:,} pixels, {ends} Angstrom; {int(instrument.mask.sum())} of them masked in every spectrum"
    reached = instrument.reached_fwhm(stars.native, stars.resolving_power)
    at = [int(i) for i in np.linspace(0, own.size - 1, 5)[1:-1]]
    widths = ", ".join(f"{reached[i]:.3g} Angstrom at {own[i]:,.0f}" for i in at)
    yield f"Gaussian line spread function; FWHM that was reached: {widths}"
    noise = instrument.noise
    low, middle, high = np.quantile(noise.snr.draw(np.random.default_rng(0), 10_000), [0.05, 0.5, 0.95])
    yield f"S/N per pixel: 90 % between {low:.0f} and {high:.0f}, median {middle:.0f}"
    correlated = f"; smoothed with a Gaussian of {noise.correlation:g} pixels" if noise.correlation else ", independent"
    yield f"Gaussian noise{correlated}, of an error that grows as flux^{noise.flux_power:g}"
    if instrument.extinction:
        low, middle, high = np.quantile(instrument.extinction.draw(np.random.default_rng(0), 10_000), [0.05, 0.5, 0.95])
        spread = f"90 % of A(V) between {low:.2f} and {high:.2f}, median {middle:.2f}"
        yield f"Extinction (Gordon et al. 2023, R(V) = 3.1): {spread}"
    if instrument.tilt:
        amplitude, degree = instrument.tilt
        yield f"A smooth tilt: exp of Legendre polynomials of degree 1 to {degree}, factors {amplitude:g} (one sigma)"
