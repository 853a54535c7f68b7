"""Grids of synthetic spectra on disk: synthesised in parallel, in shards, each written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..data.schema import LABEL_UNITS, label_names_of, pixel_column, spectrum_features, validate_table
from ..files import complete_file
from . import atmospheres, lines, turbospectrum
from .labels import LABEL_NAMES
from .sampling import SAMPLINGS
from .synthesizer import Spectrum


def features(label_names: Sequence[str] = LABEL_NAMES) -> datasets.Features:
    """Columns of a grid: the project's schema, and the continuum that turns flux into surface flux density."""
    continuum = {"continuum": datasets.List(datasets.Value("float32"))}
    return datasets.Features({**spectrum_features(label_names), **continuum})


class Source(Protocol):
    """What makes the spectra: a `Synthesizer`, or another with its method."""

    def synthesize(self, labels: Mapping[str, float]) -> Spectrum:
        """Spectrum of a star; ValueError or RuntimeError if there is none."""


@dataclass(frozen=True)
class GridSettings:
    """All that decides what a grid holds, besides the labels of its stars."""

    survey: str
    wavelength_min: float  # Angstrom, vacuum
    wavelength_max: float
    step: float  # of the synthesis: Angstrom, or ln(wavelength) if `relative`
    sampling: str  # a key of SAMPLINGS
    loggf_corrections: bool
    spherical_below: float  # log g
    shard_size: int
    relative: bool = False


@dataclass(frozen=True)
class _Result:
    seconds: float
    spectrum: Spectrum | None = None
    reason: str = ""


def write_grid(
    out: str | os.PathLike[str],
    labels: Mapping[str, NDArray[np.float64]],
    object_ids: Sequence[str],
    source: Source,
    settings: GridSettings,
    *,
    processes: int = 1,
    origin: str = "given",
) -> Iterator[tuple[int, int]]:
    """Synthesise stars into a folder of Parquet shards, going on where an earlier run stopped.

    A shard is written under another name and then renamed: a run that is killed loses the shard it is in, and none is
    ever incomplete. A star that fails is left out, and recorded with its labels and the reason in ``records`` (one file
    a shard, written after it) and in the card.

    Parameters
    ----------
    out : path
        Folder. If it holds a grid already, that must be of the same settings and labels.
    labels : mapping from label to array, shape (n,)
        All of `LABEL_NAMES`; other labels become columns, too.
    object_ids : sequence of str, n of them
    source : Source
        Called from `processes` threads at once.
    settings : GridSettings
    processes : int, default 1
        Stars synthesised at the same time.
    origin : str
        Where the labels come from, for the card.

    Yields
    ------
    (done, failed) : tuple of int
        Stars after each shard, with those of earlier runs.

    Raises
    ------
    ValueError
        If `out` holds a grid of other settings or labels, naming the first that differs.
    OSError
        If a file cannot be written.
    """
    folder = Path(out)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    version = importlib.metadata.version("spectrafm_hf")  # it pins the programs, atmospheres and lines
    names_of_labels = (*LABEL_NAMES, *(name for name in labels if name not in LABEL_NAMES))
    names_of_labels = tuple(labels) if set(labels) == set(names_of_labels) else names_of_labels
    plan = {"spectrafm_hf": version, **asdict(settings), "object_ids": list(object_ids)}
    if not settings.relative:  # plans from before there was a choice
        del plan["relative"]
    plan |= {name: np.asarray(labels[name], np.float64).tolist() for name in names_of_labels}
    _check_plan(folder / "grid.json", plan)

    n, size = len(object_ids), settings.shard_size
    (folder / "records").mkdir(exist_ok=True)
    names = [f"train-{shard:05d}-of-{-(-n // size):05d}" for shard in range(-(-n // size))]
    records = []
    with ThreadPoolExecutor(processes) as pool:
        try:
            for name, start in zip(names, range(0, n, size), strict=True):
                record = folder / "records" / f"{name}.json"
                if not record.is_file():
                    rows = range(start, min(start + size, n))
                    stars = [{label: plan[label][row] for label in names_of_labels} for row in rows]
                    futures = [pool.submit(_synthesize, source, star, settings.sampling) for star in stars]
                    results = [future.result() for future in futures]
                    ids = [object_ids[row] for row in rows]
                    _write_shard(folder / "data" / f"{name}.parquet", settings.survey, ids, stars, results)
                    _write_record(record, ids, stars, results)
                records.append(json.loads(record.read_text()))
                yield min(start + size, n), sum(len(record["failed"]) for record in records)
        finally:
            pool.shutdown(cancel_futures=True)  # if the caller stops here, stars that wait do not run
    with complete_file(folder / "README.md") as temporary:
        temporary.write_text(_card(folder, records, settings, n, origin), encoding="utf-8")


def _check_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan of a new grid, or compare it with that of the grid that is there."""
    if not path.is_file():
        with complete_file(path) as temporary:
            temporary.write_text(json.dumps(plan))
        return
    before = json.loads(path.read_text())
    for name, value in plan.items():
        if before.get(name) != value:
            was, now = (f"{len(v)} others" if isinstance(v, list) else repr(v) for v in (before.get(name), value))
            raise ValueError(f"{name}: expected {was} as in the grid in {path.parent}, got {now}; choose a new folder")


def _synthesize(source: Source, star: Mapping[str, float], sampling: str) -> _Result:
    start = time.perf_counter()
    try:
        spectrum = SAMPLINGS[sampling](source.synthesize(star))
    except (ValueError, RuntimeError) as error:
        return _Result(time.perf_counter() - start, reason=str(error) or type(error).__name__)
    return _Result(time.perf_counter() - start, spectrum)


def _write_shard(
    path: Path,
    survey: str,
    object_ids: Sequence[str],
    stars: Sequence[Mapping[str, float]],
    results: Sequence[_Result],
) -> None:
    good = [i for i, result in enumerate(results) if result.spectrum is not None]
    if not good:
        return  # `datasets` refuses a file without rows
    spectra = [results[i].spectrum for i in good]
    lengths = [len(spectrum.wavelength) for spectrum in spectra if spectrum]
    pixels = {
        name: np.concatenate([np.empty(0), *(getattr(spectrum, name) for spectrum in spectra)])
        for name in ("wavelength", "flux", "continuum")
    }
    pixels["flux_error"] = np.full(sum(lengths), np.nan)  # a synthetic spectrum has no noise
    pixels["mask"] = np.zeros(sum(lengths), bool)
    columns: dict[str, Any] = {"object_id": pa.array([object_ids[i] for i in good], pa.string())}
    columns["survey"] = pa.array([survey] * len(good), pa.string())
    columns |= {name: pixel_column(values, lengths) for name, values in pixels.items()}
    columns["snr"] = pa.array(np.full(len(good), np.nan, np.float32))
    for name in stars[0]:
        columns[name] = pa.array(np.array([stars[i][name] for i in good], np.float32))
        columns[f"{name}_err"] = pa.array(np.zeros(len(good), np.float32))
    schema = features(list(stars[0]))
    table = pa.table({name: columns[name] for name in schema}).cast(schema.arrow_schema)
    validate_table(table)
    with complete_file(path) as temporary:
        # Bytes of like weight side by side compress best, and rows of the same wavelengths in one page.
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=[f"{name}.list.element" for name in ("wavelength", "flux", "continuum")],
            data_page_size=1 << 25,
        )


def _write_record(
    path: Path, object_ids: Sequence[str], stars: Sequence[Mapping[str, float]], results: Sequence[_Result]
) -> None:
    outcomes = list(zip(object_ids, stars, results, strict=True))
    failed = [{"object_id": name, "reason": result.reason, **star} for name, star, result in outcomes if result.reason]
    record = {"failed": failed, "seconds": [result.seconds for result in results if not result.reason]}
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


_CARD = """---
license: apache-2.0
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- astronomy
- spectroscopy
- synthetic
---
# {settings.survey}: {n_good} synthetic stellar spectra

{settings.wavelength_min:g} to {settings.wavelength_max:g} Angstrom in vacuum, sampling `{settings.sampling}`.
Written by `scripts/synthesize_grid.py` of spectrafm_hf {version}.
`flux` is divided by the continuum; `flux * continuum` is the flux density at the surface of the star in
erg/s/cm2/Angstrom. There is no noise: `flux_error` and `snr` are NaN, the errors of the labels 0, no pixel is masked.

Samplings: `native` is the step of the synthesis; `apstar` is R = 22,500 (Gaussian) on the pixels
log10(wavelength) = 4.179 + 6e-6 i; `bins` are means over 2.5 Angstrom; `r20000` are means over 2e-5 in
ln(wavelength), without a line spread function.

## Made from

| part | package | SHA-256 of the file |
|---|---|---|
{packages}

| setting | value |
|---|---|
| step | {settings.step:g} {step_unit} |
| oscillator strengths | {corrections} |
| metallicity of the atmosphere | [M/H] = [Fe/H] + log10(0.638 * 10^[Mg/Fe] + 0.362) |
| geometry | spherical below log g = {settings.spherical_below:g}, plane-parallel above |
| solar abundances | Grevesse, Asplund & Sauval (2007), as MARCS |
| 12C/13C | 15 below log g = 3.5, 89 above |
| TiO | below 4,700 K (5,000 K above log g = 3.3) |
| compiler options | `{options}` |
| patch of Turbospectrum | `{patch}` |
| time per spectrum | median {median_seconds:.1f} s, maximum {most_seconds:.1f} s, wall clock |

## Labels

{origin}.

| label | unit | lowest | median | highest |
|---|---|---|---|---|
{ranges}

## Stars that failed

{n_failed} of {n}.

{failures}

## Not in it

Departures from LTE, three-dimensional atmospheres, chromospheres, rotation; CaH, VO and ZrO. The atmospheres have solar
ratios: alpha elements come in by their metallicity. Below about 3,600 K, where water and TiO rule, do not trust
the spectra.
"""


def _card(folder: Path, records: Sequence[Mapping[str, Any]], settings: GridSettings, n: int, origin: str) -> str:
    failed = [star for record in records for star in record["failed"]]
    seconds = np.array([value for record in records for value in record["seconds"]] or [np.nan])
    shards = sorted((folder / "data").glob("*.parquet"))
    # Without the pixels; pyarrow cannot read a list of no files.
    names = label_names_of(pq.read_schema(shards[0]).names) if shards else []
    labels = pq.read_table(shards, columns=names).to_pydict() if shards else {}
    ranges = "\n".join(
        f"| `{name}` | {LABEL_UNITS[name]} | {np.min(column):.2f} | {np.median(column):.2f} | {np.max(column):.2f} |"
        for name, column in labels.items()
    )
    packages = "\n".join(
        f"| {what} | `{name}=={version}` | `{sha256}` |"
        for what, (name, version, sha256) in {
            "Turbospectrum 20.1 (radiative transfer, LTE)": turbospectrum.PACKAGE,
            "MARCS (model atmospheres)": atmospheres.PACKAGE,
            "linemake (line lists)": lines.PACKAGE,
        }.items()
    )
    failures = "\n".join(f"- `{star['object_id']}`: {star['reason']}" for star in failed[:50]) or "None."
    corrections = f"with the corrections of `{lines.LOGGF_CORRECTIONS}`" if settings.loggf_corrections else "as listed"
    return _CARD.format(
        settings=settings,
        version=importlib.metadata.version("spectrafm_hf"),
        packages=packages,
        step_unit="in ln(wavelength)" if settings.relative else "Angstrom (air)",
        corrections=corrections,
        options=turbospectrum.OPTIONS,
        patch=turbospectrum.PATCH,
        median_seconds=np.median(seconds),
        most_seconds=np.max(seconds),
        origin=origin[:1].upper() + origin[1:],
        ranges=ranges,
        n=n,
        n_good=n - len(failed),
        n_failed=len(failed),
        failures=failures,
    )
