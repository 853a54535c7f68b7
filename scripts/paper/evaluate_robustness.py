#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Predictions of a checkpoint for the same stars on other grids, with missing pixels, and with faults.

    python scripts/paper/evaluate_robustness.py --model spectrafm-base        # validation stars, during development
    python scripts/paper/evaluate_robustness.py --model NAME --split test --stars 10000 --output robustness.json
    python scripts/paper/evaluate_robustness.py --model NAME --inputs apogee --snr 200 100 50

Two kinds of input:

- `gaia-xp`: observed stars of Gaia XP with labels of APOGEE, 3,500 K < teff < 6,500 K, of the chosen split.
- `apogee`: synthetic stars of the H band emulator, 4,000 K < teff < 6,000 K, [Fe/H] > -1, with the noise of the
  instrument `apogee`. No training draws them. Validation and test stars differ here, too.

By default, the kinds in the training range of the checkpoint are evaluated. Each row of the table is one change.
It differs from star to star (such as the masked pixels), and is the same for the same seed.

How spectra get onto another grid:

- Observed spectra: a cubic spline interpolates the cumulative flux at the edges of the pixels. A new pixel is the
  difference of it over the width of the pixel, so flux is conserved. This is a product with a matrix, and the
  variances are multiplied with its square. The errors ignore correlations, as files of real instruments do: new pixels
  that are narrower than the old ones share noise. A new pixel that overlaps a masked one is masked.
- Synthetic spectra are made on the new grid, with the line spread function of APOGEE and independent noise. The error
  is proportional to 1 / sqrt(width of a pixel), so that all grids have the same information. Each detector
  has its own grid; pixels between detectors are absent unless a row says otherwise.

Figures of each label:

- scatter: 1.4826 MAD of predicted - true; bias: the median of predicted - true;
- error/sigma: 1.4826 median of |predicted - true| / error, 1 where errors are right. Errors of catalogue labels are
  added in quadrature;
- the scatter over that of the first row;
- in brackets, the ratio expected from the lost pixels: that of the Cramer-Rao bounds (median over some stars, see
  `spectrafm_hf.synthesis.bounds`). Rows with faults that remove no information have none.

For these bounds, abundances and microturbulence have the spread of the stars as a prior, and wild pixels count as lost.
Noise counts as independent; regridded spectra get errors that hold as much information as before. The bounds of Gaia XP
are those of synthetic stars at the S/N of the observed ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from tqdm.auto import tqdm

from spectrafm_cli.arguments import DEFAULT_MODEL, Parser
from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data import LABEL_UNITS, build_gaia_xp, cache_dir, flat_pixels
from spectrafm_hf.data.gaia_xp import LABELS as XP_LABELS
from spectrafm_hf.data.gaia_xp import WAVELENGTH as XP_WAVELENGTH
from spectrafm_hf.files import complete_file, write_json
from spectrafm_hf.hub.cards import checksums
from spectrafm_hf.inference.prediction import FLAG_SEPARATOR, batches_of, predict_batches
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.models.gate_spectrafm import SPEED_OF_LIGHT, air_to_vacuum
from spectrafm_hf.statistics import MAD_TO_SIGMA, robust_scatter
from spectrafm_hf.synthesis.bounds import cramer_rao, held_out_labels, label_bound, label_weights, observe, pixel_errors
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.line_spread import pixel_edges
from spectrafm_hf.synthesis.synthetic import load_emulator


Array = NDArray[Any]

KINDS = ("gaia-xp", "apogee")
PARTS = {"validation": 0, "test": 1}  # of the held-out synthetic stars
XP_TEFF = (3500.0, 6500.0)
APOGEE_RANGES = {"teff": (4000.0, 6000.0), "fe_h": (-1.0, 1.0)}
#: Pixels of the apStar grid that APOGEE's data release 12 has in its 7,214: those of each detector, the last excluded.
DR12 = ((322, 3242), (3648, 6048), (6412, 8306))
VELOCITY = 30.0  # km/s
WILD = (20.0, 100.0)  # sigma, either sign
BOUND_STARS = 48
BOOTSTRAPS = 100
LABELS_A_TABLE = 3
TYPICAL_RATIO = 1.5  # whose standard error is printed


# -------------------------------------------------------------------------------------------------------------- spectra


class Spectra(NamedTuple):
    """
    Some stars, each with as many pixels; masks are True for bad pixels.

    `jacobian` has the derivatives of the flux of the first stars, (some stars, parameters, pixels). Changes of the flux
    are also applied to them, for the bound of a changed spectrum.
    """

    wavelength: Array  # (stars, pixels) Angstrom, vacuum
    flux: Array  # (stars, pixels)
    error: Array  # (stars, pixels)
    mask: Array  # (stars, pixels)
    jacobian: Array | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """In the schema of this project."""
        for i in range(len(self.flux)):
            yield {
                "object_id": str(i),
                "wavelength": self.wavelength[i],
                "flux": self.flux[i],
                "flux_error": self.error[i],
                "mask": self.mask[i],
            }


Change = Callable[[Spectra, np.random.Generator], Spectra]


def chosen_pixels(shape: tuple[int, ...], count: int, generator: np.random.Generator) -> Array:
    """True for `count` pixels of each star."""
    order = np.argsort(generator.random(shape), axis=1)
    chosen = np.zeros(shape, bool)
    np.put_along_axis(chosen, order[:, :count], True, axis=1)
    return chosen


def masked(share: float | None = None, count: int = 0) -> Change:
    """Pixels masked at random: a share of all, or a number."""

    def change(spectra: Spectra, generator: np.random.Generator) -> Spectra:
        shape = spectra.flux.shape
        chosen = chosen_pixels(shape, count if share is None else round(share * shape[1]), generator)
        return spectra._replace(mask=spectra.mask | chosen)

    return change


def absent(count: int, pieces: Sequence[slice]) -> Change:
    """Without `count` pixels of each piece of the spectrum: they are not in the table."""

    def change(spectra: Spectra, generator: np.random.Generator) -> Spectra:
        kept = np.ones(spectra.flux.shape, bool)
        for piece in pieces:
            kept[:, piece] = ~chosen_pixels(kept[:, piece].shape, count, generator)
        pixels = (column[kept].reshape(len(kept), -1) for column in spectra[:4])
        slopes = spectra.jacobian
        if slopes is not None:
            some = np.broadcast_to(kept[: len(slopes), None], slopes.shape)
            slopes = slopes[some].reshape(*slopes.shape[:2], -1)
        return Spectra._make((*pixels, slopes))

    return change


def only(pixels: Array) -> Change:
    """Only these pixels are in the table."""

    def change(spectra: Spectra, generator: np.random.Generator) -> Spectra:
        slopes = spectra.jacobian
        columns = (column[..., pixels] for column in spectra[:4])
        return Spectra._make((*columns, None if slopes is None else slopes[..., pixels]))

    return change


def hidden(pixels: Array) -> Change:
    """These pixels are masked in every star."""
    return lambda spectra, generator: spectra._replace(mask=spectra.mask | pixels)


def rebinned(factor: int, pieces: Sequence[slice]) -> Change:
    """Means over `factor` neighbours, weighted by width; what is left at the end of a piece is dropped."""

    def change(spectra: Spectra, generator: np.random.Generator) -> Spectra:
        parts = []
        for piece in pieces:
            wavelength = spectra.wavelength[0, piece]
            size = len(wavelength) // factor * factor
            weight = np.diff(pixel_edges(wavelength))[:size].reshape(-1, factor)
            weight /= weight.sum(axis=1, keepdims=True)

            def groups(column: Array, piece: slice = piece, size: int = size) -> Array:
                return column[..., piece][..., :size].reshape(*column.shape[:-1], -1, factor)

            parts.append(
                (
                    groups(spectra.wavelength).mean(axis=-1),
                    (groups(spectra.flux) * weight).sum(axis=-1),
                    np.sqrt(((groups(spectra.error) * weight) ** 2).sum(axis=-1)),
                    groups(spectra.mask).any(axis=-1),
                    None if spectra.jacobian is None else (groups(spectra.jacobian) * weight).sum(axis=-1),
                )
            )
        columns = zip(*parts, strict=True)
        return Spectra._make(None if column[0] is None else np.concatenate(column, axis=-1) for column in columns)

    return change


def regridding_matrix(edges: Array, new_edges: Array) -> Array:
    """
    Means over new pixels from means over old ones, shape (new pixels, pixels): cubic spline of the cumulative flux.

    Parameters
    ----------
    edges : array, shape (pixels + 1,)
    new_edges : array, shape (new pixels + 1,), within `edges`
    """
    cumulative = np.concatenate([np.zeros((1, len(edges) - 1)), np.cumsum(np.diag(np.diff(edges)), axis=0)])
    at_new: Array = CubicSpline(edges, cumulative)(new_edges)
    return np.diff(at_new, axis=0) / np.diff(new_edges)[:, None]


def regridded(new_edges: Array) -> Change:
    """On pixels of these edges, see the head of this file. All stars must have the same pixels."""

    def change(spectra: Spectra, generator: np.random.Generator) -> Spectra:
        wavelength = spectra.wavelength[0].astype(np.float64)
        edges = pixel_edges(wavelength)
        matrix = regridding_matrix(edges, new_edges)
        flux, error = spectra.flux.astype(np.float64), spectra.error.astype(np.float64)
        for star in np.flatnonzero(spectra.mask.any(axis=1)):
            bad = spectra.mask[star]
            for column in (flux, error):
                column[star, bad] = np.interp(wavelength[bad], wavelength[~bad], column[star, ~bad])
        rounding = 1e-9 * edges[-1]
        overlap = (new_edges[1:, None] > edges[:-1] + rounding) & (new_edges[:-1, None] < edges[1:] - rounding)
        middles = (new_edges[1:] + new_edges[:-1]) / 2
        if spectra.jacobian is None:
            new_error = np.sqrt(error**2 @ (matrix**2).T)
        else:  # for the bound, which takes pixels for independent: as much information as before
            widths = np.interp(middles, wavelength, np.diff(edges)) / np.diff(new_edges)
            new_error = np.stack([np.interp(middles, wavelength, one) for one in error]) * np.sqrt(widths)
        return Spectra(
            np.broadcast_to(middles, (len(flux), len(middles))),
            (flux @ matrix.T).astype(np.float32),
            new_error.astype(np.float32),
            spectra.mask @ overlap.T,
            None if spectra.jacobian is None else spectra.jacobian @ matrix.T,
        )

    return change


def wild(count: int) -> Change:
    """Pixels that are off by `WILD` sigma, and not masked. The bound counts them as lost."""

    def change(spectra: Spectra, generator: np.random.Generator) -> Spectra:
        chosen = chosen_pixels(spectra.flux.shape, count, generator)
        off = generator.uniform(*WILD, chosen.shape) * generator.choice([-1, 1], chosen.shape) * spectra.error
        flux = np.where(chosen, spectra.flux + off, spectra.flux).astype(np.float32)
        slopes = spectra.jacobian
        if slopes is not None:
            slopes = np.where(chosen[: len(slopes), None], 0, slopes)
        return spectra._replace(flux=flux, jacobian=slopes)

    return change


def same(spectra: Spectra, generator: np.random.Generator) -> Spectra:
    return spectra


#: The spectra of a row, and those with derivatives for its bound; None if no information is lost.
Row = tuple[Spectra, Spectra | None]


@dataclasses.dataclass
class Kind:
    """One kind of input: its truth, and its rows, of which the first one holds the whole spectra."""

    title: str
    truth: dict[str, Array]
    truth_errors: dict[str, Array]
    parameters: tuple[str, ...]  # of the derivatives
    prior: Array
    rows: dict[str, Callable[[], Row]]


# -------------------------------------------------------------------------------------------------------------- Gaia XP


def xp_changes() -> dict[str, Change]:
    """Rows by name."""
    pixels, edges = len(XP_WAVELENGTH), pixel_edges(XP_WAVELENGTH.astype(np.float64))
    whole = [slice(0, pixels)]
    fine = np.linspace(edges[0], edges[-1], 2 * pixels + 1)
    logarithmic = np.geomspace(edges[0], edges[-1], pixels + 1)
    logarithmic[[0, -1]] = edges[[0, -1]]  # rounding must not lead beyond
    return {
        "whole": same,
        f"one of {pixels} pixels masked": masked(count=1),
        "10 % masked": masked(share=0.1),
        "30 % masked": masked(share=0.3),
        "five pixels absent from the table": absent(5, whole),
        "rebinned by two": rebinned(2, whole),
        "10 A grid": regridded(fine),
        "logarithmic grid": regridded(logarithmic),
        "five wild pixels": wild(5),
    }


def read_xp(folder: Path, split: str, n: int, seed: int) -> tuple[Spectra, dict[str, Array], dict[str, Array]]:
    """`n` stars at random of a split, or all if there are not so many: spectra, labels and their errors."""
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"data: expected files {folder / 'data' / split}-*.parquet, got none")
    table = pq.read_table(files)
    teff = table["teff"].to_numpy()
    stars = np.flatnonzero((teff > XP_TEFF[0]) & (teff < XP_TEFF[1]))
    if not len(stars):
        raise ValueError(f"data: expected stars of {XP_TEFF[0]:g} to {XP_TEFF[1]:g} K in the split {split}, got none")
    table = table.take(np.sort(np.random.default_rng(seed).permutation(stars)[:n]))
    columns = []
    for name in ("wavelength", "flux", "flux_error", "mask"):
        values, lengths = flat_pixels(table[name])
        if (lengths != len(XP_WAVELENGTH)).any():
            raise ValueError(f"{name}: expected {len(XP_WAVELENGTH)} pixels in every row, got {lengths.min()}")
        columns.append(values.reshape(len(table), -1))
    if not np.allclose(columns[0], XP_WAVELENGTH):
        raise ValueError(f"wavelength: expected the grid of Gaia XP, got {columns[0][0, :3].tolist()} ...")
    truth, errors = (
        {name: table[f"{name}{end}"].to_numpy().astype(np.float64) for name in XP_LABELS} for end in ("", "_err")
    )
    return Spectra(*columns), truth, errors


def synthetic_xp(snr: Array, seed: int, part: int) -> tuple[Spectra, tuple[str, ...], Array]:
    """Some synthetic stars with derivatives, at these S/N: what the bound of Gaia XP is computed from."""
    instrument = Instrument.load("gaia-xp")
    emulator = load_emulator(instrument.emulator)
    table = held_out_labels(emulator, len(snr), seed, {"teff": XP_TEFF}, part)
    observed = observe(instrument, emulator, table, np.random.default_rng([seed, part]), priors=priors(emulator, table))
    error = pixel_errors(instrument, observed.flux, snr)
    level = np.median(observed.flux, axis=1, keepdims=True)
    wavelength = np.broadcast_to(instrument.wavelength, error.shape)
    slopes = observed.jacobian / level[:, None]  # type: ignore[operator]  # derivatives are computed by default
    mask = np.zeros(error.shape, bool)
    return Spectra(wavelength, observed.flux / level, error / level, mask, slopes), observed.names, observed.prior


def priors(emulator: Any, table: Array) -> dict[str, float]:
    """Spread of all labels except the first three, which have no prior."""
    return dict(zip(emulator.config.label_names[3:], table.std(axis=0)[3:].tolist(), strict=True))


def gaia_xp(arguments: argparse.Namespace) -> Kind:
    """Observed stars."""
    folder = arguments.data or build_gaia_xp(cache_dir() / "gaia-xp")
    spectra, truth, errors = read_xp(folder, arguments.split, arguments.stars, arguments.seed)
    usable = np.where(spectra.mask, np.nan, spectra.flux / spectra.error)
    snr = np.nanmedian(usable, axis=1).clip(min=1.0)
    some = np.random.default_rng(arguments.seed).choice(snr, BOUND_STARS)
    synthetic, names, prior = synthetic_xp(some, arguments.seed, PARTS[arguments.split])

    def row(number: int, change: Change) -> Row:
        observed, bound = (change(one, np.random.default_rng([arguments.seed, number])) for one in (spectra, synthetic))
        return observed, bound

    rows: dict[str, Callable[[], Row]] = {
        name: functools.partial(row, i, change) for i, (name, change) in enumerate(xp_changes().items())
    }
    low, high = XP_TEFF
    title = f"Gaia XP: {len(snr):,} {arguments.split} stars of {low:,.0f} to {high:,.0f} K"
    return Kind(title, truth, errors, names, prior, rows)


# --------------------------------------------------------------------------------------------------------------- APOGEE


class ApogeeStars:
    """Synthetic stars, on any grid; one noise for all rows on the pixels of apStar, another for each other grid."""

    def __init__(self, n: int, snr: float, seed: int, part: int) -> None:
        self.instrument, self.seed, self.part = Instrument.load("apogee"), seed, part
        self.apstar = dataclasses.replace(Instrument.load("apogee-apstar"), masks=())
        self.emulator = load_emulator(self.instrument.emulator)
        self.table = held_out_labels(self.emulator, n, seed, APOGEE_RANGES, part)
        self.priors = priors(self.emulator, self.table)
        grid = self.apstar.wavelength
        #: Pixels of the apStar grid that lie on a detector, and which one.
        self.detector = np.full(len(grid), -1)
        for i, pixels in enumerate(self.instrument.detectors):
            self.detector[np.searchsorted(grid, pixels[0] - 0.1) :][: len(pixels)] = i
        self.seen = self.detector >= 0
        clean, slopes = self._observe(self.apstar)
        error = pixel_errors(self.apstar, clean, snr)
        # The S/N is that of the pixels on detectors.
        error *= np.median(clean[:, self.seen] / error[:, self.seen], axis=1, keepdims=True) / np.float32(snr)
        self.clean, self.whole = clean, self._noisy(grid, clean, error, slopes, 0)

    def worse(self, factor: float) -> Spectra:
        """The same stars and noise on all pixels of apStar, the noise `factor` times as large."""
        flux = self.clean + np.float32(factor) * (self.whole.flux - self.clean)
        return self.whole._replace(flux=flux, error=np.float32(factor) * self.whole.error)

    def on(self, detectors: Sequence[Array], number: int, seen_at: Sequence[Array] | None = None) -> Spectra:
        """
        On other pixels.

        Parameters
        ----------
        detectors : sequence of arrays
            Wavelengths that the table states.
        number : int
            Number of the row, for its noise.
        seen_at : sequence of arrays, optional
            True wavelengths of these pixels, in vacuum and at rest.
        """
        instrument = dataclasses.replace(self.instrument, detectors=tuple(seen_at or detectors), _responses={})
        clean, slopes = self._observe(instrument)
        stated, grid = np.concatenate(detectors), self.apstar.wavelength
        widths = np.concatenate([np.diff(pixel_edges(pixels)) for pixels in detectors])
        wider = np.interp(stated, grid, np.diff(pixel_edges(grid))) / widths
        error = np.stack([np.interp(stated, grid, one) for one in self.whole.error]) * np.sqrt(wider)
        return self._noisy(stated, clean, error.astype(np.float32), slopes, number)

    def _observe(self, instrument: Instrument) -> tuple[Array, Array]:
        generator = np.random.default_rng(0)  # nothing is drawn: there is neither extinction nor tilt
        observed = observe(instrument, self.emulator, self.table, generator, derivatives=False)
        some = observe(instrument, self.emulator, self.table[:BOUND_STARS], generator, priors=self.priors)
        self.names, self.prior = some.names, some.prior
        assert some.jacobian is not None
        return observed.flux, some.jacobian

    def _noisy(self, wavelength: Array, clean: Array, error: Array, slopes: Array, number: int) -> Spectra:
        generator = np.random.default_rng([self.seed, self.part, number])
        flux = clean + error * generator.standard_normal(clean.shape, np.float32)
        return Spectra(np.broadcast_to(wavelength, flux.shape), flux, error, np.zeros(flux.shape, bool), slopes)


def apogee(arguments: argparse.Namespace) -> Kind:
    """Synthetic stars."""
    seed, part = arguments.seed, PARTS[arguments.split]
    first, *others = arguments.snr
    stars = ApogeeStars(arguments.stars, first, seed, part)
    grid, detectors, seen = stars.apstar.wavelength, stars.instrument.detectors, stars.seen
    sizes = np.cumsum([0, *map(len, detectors)])
    pieces = [slice(low, high) for low, high in zip(sizes[:-1], sizes[1:], strict=True)]
    dr12 = np.zeros(len(grid), bool)
    for low, high in DR12:
        dr12[low:high] = True
    half_a_pixel = np.exp(np.log(grid[1] / grid[0]) / 2)
    moved = [one / (1 + VELOCITY / SPEED_OF_LIGHT) for one in detectors]
    in_air = [air_to_vacuum(one) for one in detectors]
    whole = only(seen)(stars.whole, np.random.default_rng(0))

    rows: dict[str, Callable[[], Row]] = {}

    def add(name: str, spectra: Callable[[], Spectra], trusted: bool = True) -> None:
        rows[name] = lambda: (made := spectra(), made if trusted else None)

    def add_change(name: str, change: Change, stars: Spectra = whole) -> None:
        number = len(rows)
        add(name, lambda: change(stars, np.random.default_rng([seed, part, number, 1])))

    n, n_dr12, n_grid = (f"{number:,} pixels" for number in (seen.sum(), dr12.sum(), len(grid)))
    add_change(f"{n}, S/N {first:g}", same)
    for snr in others:
        add_change(f"{n}, S/N {snr:g}", only(seen), stars.worse(first / snr))
    add_change("without one pixel in each detector", absent(1, pieces))
    add_change(f"DR12's {n_dr12}, the others masked", hidden(~dr12[seen]))
    add_change(f"DR12's {n_dr12}, alone in the table", only(dr12), stars.whole)
    add_change(f"{n_grid}, gaps masked", hidden(~seen), stars.whole)
    add_change(f"{n_grid}, gaps filled", same, stars.whole)
    add("linear 0.2 A grid", lambda: stars.on([np.arange(one[0], one[-1], 0.2) for one in detectors], 1))
    add("shifted by half a pixel", lambda: stars.on([one[:-1] * half_a_pixel for one in detectors], 2))
    add_change("rebinned by five", rebinned(5, pieces))
    add_change("30 % masked", masked(share=0.3))
    for i, colour in enumerate(("blue", "green", "red")):
        add_change(f"{colour} detector alone", only(stars.detector == i), stars.whole)
    add(f"{VELOCITY:g} km/s left in", lambda: stars.on(detectors, 3, moved), trusted=False)
    add("air taken for vacuum", lambda: stars.on(detectors, 4, in_air), trusted=False)
    add_change("15 wild pixels", wild(15))
    add("errors 2 times too small", lambda: whole._replace(error=whole.error / 2), trusted=False)

    names = list(stars.emulator.config.label_names)
    truth = {name: stars.table @ label_weights(names, name) for name in (*names, "alpha_m")}
    ranges = ", ".join(f"{low:g} <= {name} <= {high:g}" for name, (low, high) in APOGEE_RANGES.items())
    title = (
        f"APOGEE, synthetic: {len(stars.table):,} {arguments.split} stars, {ranges}; S/N {first:g} where none is said"
    )
    exact = {name: np.zeros(len(stars.table)) for name in truth}
    return Kind(title, truth, exact, stars.names, stars.prior, rows)


# -------------------------------------------------------------------------------------------------------------- figures


class Checkpoint:
    """A model with its flags."""

    def __init__(self, name: str) -> None:
        self.model, self.tokenizer = load_checkpoint(name)
        self.training_range = TrainingRange.load(str(self.model.name_or_path))
        self.about = {"name": name, **checksums(self.model, self.tokenizer)}
        if torch.cuda.is_available():
            self.model.cuda()  # type: ignore[call-arg]  # transformers wraps it without its types

    def labels(self, requests: Sequence[str] | None) -> list[str]:
        """The requested labels, by default those of the checkpoint; raises ValueError for unknown ones."""
        labels = list(requests or self.tokenizer.requests or self.tokenizer.label_names)
        self.tokenizer.label_ids(labels)
        return labels

    def kinds(self) -> list[str]:
        """Kinds of input that lie in its training range; all if it has none."""
        middles = {"gaia-xp": float(np.median(XP_WAVELENGTH)), "apogee": 16_000.0}
        limits = self.training_range and self.training_range.wavelength
        if not limits:
            return list(KINDS)
        pairs = np.reshape(limits, (-1, 2))
        kinds = [name for name, middle in middles.items() if ((pairs[:, 0] < middle) & (middle < pairs[:, 1])).any()]
        if not kinds:
            raise ValueError(f"inputs: expected {' or '.join(KINDS)} for a model trained on {pairs.tolist()} Angstrom")
        return kinds

    def predict(self, spectra: Spectra, labels: Sequence[str]) -> dict[str, Array]:
        batches = batches_of(spectra.rows(), self.tokenizer)
        answers = list(predict_batches(self.model, self.tokenizer, batches, labels, self.training_range))
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def median(values: Array) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def label_figures(residual: Array, sigma: Array) -> dict[str, Any]:
    """Of one label; residuals are NaN where there is no answer or no truth."""
    known = np.isfinite(residual)
    off = np.abs(residual[known] / sigma[known])
    return {
        "stars": int(known.sum()),
        "scatter": robust_scatter(residual[known]),
        "bias": median(residual[known]),
        "error_over_sigma": MAD_TO_SIGMA * median(off),
        "beyond_5_sigma": float(np.mean(off > 5)) if len(off) else float("nan"),
    }


def scatter_ratio(residual: Array, reference: Array, seed: int) -> tuple[float, float]:
    """Scatter over that of the reference, and its standard error from bootstraps of the stars, which both share."""

    def ratio(stars: Array | slice) -> float:
        one, other = residual[stars], reference[stars]
        below = robust_scatter(other[np.isfinite(other)])
        return robust_scatter(one[np.isfinite(one)]) / below if below > 0 else float("nan")

    generator = np.random.default_rng(seed)
    again = [ratio(generator.integers(0, len(residual), len(residual))) for _ in range(BOOTSTRAPS)]
    return ratio(slice(None)), float(np.nanstd(again)) if np.isfinite(again).any() else float("nan")


def flag_shares(flags: Array) -> dict[str, float]:
    """Share of stars with each flag, the most frequent first; reasons that quote numbers by their first words."""
    names = Counter(
        name for joined in flags for name in {flag.partition(":")[0] for flag in joined.split(FLAG_SEPARATOR)} if name
    )
    return {name: count / len(flags) for name, count in names.most_common()}


def row_bounds(bound: Spectra, kind: Kind, labels: Sequence[str]) -> dict[str, Array]:
    """Bound of each label, shape (some stars,)."""
    slopes = bound.jacobian
    if slopes is None:
        raise ValueError("bound: expected spectra with derivatives, got some without")
    some = slice(0, len(slopes))
    ivar = np.where(bound.mask[some], 0.0, bound.error[some].astype(np.float64) ** -2)
    covariance = cramer_rao(slopes, ivar, kind.prior)
    return {name: label_bound(covariance, kind.parameters, name) for name in labels}


def evaluate(checkpoint: Checkpoint, kind: Kind, requests: Sequence[str], seed: int) -> dict[str, Any]:
    """All rows of one kind of input."""
    labels = [name for name in requests if name in kind.truth]
    if not labels:
        raise ValueError(f"labels: expected some of {list(kind.truth)}, got {list(requests)}")
    table: dict[str, Any] = {}
    whole: dict[str, Array] = {}
    whole_bound: dict[str, Array] = {}
    for name, make in tqdm(kind.rows.items(), desc=kind.title.partition(":")[0], unit="row", delay=2):
        spectra, bound = make()
        answers = checkpoint.predict(spectra, requests)
        found = row_bounds(bound, kind, labels) if bound else {}
        residuals = {label: answers[label] - kind.truth[label] for label in labels}
        whole, whole_bound = whole or residuals, whole_bound or found
        figures = {}
        for label in labels:
            sigma = np.hypot(answers[f"{label}_err"], np.nan_to_num(kind.truth_errors[label]))
            ratio, error = scatter_ratio(residuals[label], whole[label], seed)
            figures[label] = {
                **label_figures(residuals[label], sigma),
                "ratio": ratio,
                "ratio_error": error,
                "bound_ratio": median(found[label] / whole_bound[label]) if found else None,
            }
        flags = answers["flags"]
        table[name] = {
            "pixels": int(spectra.flux.shape[1]),
            "masked": float(spectra.mask.mean()),
            "flagged": float(np.mean([bool(joined) for joined in flags])),
            "no_answer": float(np.mean(np.isnan(answers[labels[0]]))),
            "flags": flag_shares(flags),
            "labels": figures,
        }
    return {"title": kind.title, "stars": len(kind.truth[labels[0]]), "labels": labels, "rows": table}


# ---------------------------------------------------------------------------------------------------------------- table


def cell(label: str, figures: Mapping[str, Any], first: bool) -> str:
    """`scatter (bias; error/sigma) ratio [ratio of the bounds]`."""
    digits = 1 if label == "teff" else 4
    text = f"{figures['scatter']:.{digits}f} ({figures['bias']:+.{digits}f}; {figures['error_over_sigma']:.2f})"
    if first:
        return text
    bound = "" if figures["bound_ratio"] is None else f" [{figures['bound_ratio']:.2f}]"
    return f"{text} {figures['ratio']:.2f}{bound}"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table with columns of one width; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def as_markdown(report: Mapping[str, Any]) -> str:
    """The printed text: for each kind of input tables of three labels, then of the flags."""
    lines = [f"`{report['command']}`", ""]
    lines += ["Each cell: scatter (bias; error/sigma) scatter over that of the first row [the same of the bound].", ""]
    errors = [
        figures["ratio_error"]
        for result in report["results"].values()
        for row in list(result["rows"].values())[1:]
        for figures in row["labels"].values()
        if figures["ratio"] < TYPICAL_RATIO
    ]
    if errors:
        lines += [
            f"Standard error of ratios below {TYPICAL_RATIO:g} (bootstraps of the stars): {np.median(errors):.2f}.",
            "",
        ]
    for result in report["results"].values():
        lines += [f"## {result['title']}", ""]
        labels, rows = result["labels"], result["rows"]
        for start in range(0, len(labels), LABELS_A_TABLE):
            some = labels[start : start + LABELS_A_TABLE]
            head = ["input", *(f"{name} [{LABEL_UNITS.get(name, '').split(' (')[0]}]" for name in some)]
            cells = [
                [name, *(cell(label, row["labels"][label], i == 0) for label in some)]
                for i, (name, row) in enumerate(rows.items())
            ]
            lines += [*markdown([head, *cells]), ""]
        flags: list[list[str]] = [["input", "pixels", "masked", "flagged", "no answer", "flags: share of stars"]]
        for name, row in rows.items():
            shares = ", ".join(f"{flag} {share:.1%}" for flag, share in list(row["flags"].items())[:6])
            numbers = [f"{row[column]:.1%}" for column in ("masked", "flagged", "no_answer")]
            flags.append([name, f"{row['pixels']:,}", *numbers, shares])
        lines += [*markdown(flags), ""]
    return "\n".join(lines[:-1])


# -------------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 for bad input (one line on stderr)."""
    parser = Parser(
        prog="evaluate_robustness.py",
        description="Predictions of a checkpoint on other grids, with missing pixels, and with faults.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_FOLDER")
    parser.add_argument("--inputs", nargs="+", choices=KINDS, help="default: those in the training range of the model")
    parser.add_argument("--split", choices=tuple(PARTS), default="validation")
    parser.add_argument("--data", type=Path, metavar="DIR", help="made by `spectrafm data gaia-xp`; default: made now")
    parser.add_argument("--stars", type=int, default=1000, metavar="N", help="of each kind of input (default 1000)")
    parser.add_argument(
        "--snr",
        type=float,
        nargs="+",
        default=[200.0, 100.0],
        metavar="S/N",
        help="per pixel of APOGEE; all rows have the first one (default 200 100)",
    )
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="default: those that the model answers")
    parser.add_argument("--seed", type=int, default=0, help="of stars, noise and pixels (default 0)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="all figures; the tables lie beside it, in FILE.md"
    )
    arguments = parser.parse_args(argv)
    command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        for field, number, least in (("stars", arguments.stars, 2), ("seed", arguments.seed, 0)):
            if number < least:
                raise ValueError(f"{field}: expected at least {least}, got {number}")
        if output := arguments.output:
            if output.suffix != ".json":
                raise ValueError(f"output: expected a name that ends in .json, got {output.name}")
            if not output.absolute().parent.is_dir():
                raise ValueError(f"output: expected a folder that exists, got {output.parent}")
        checkpoint = Checkpoint(arguments.model)
        labels = checkpoint.labels(arguments.labels)
        report: dict[str, Any] = {
            "command": shlex.join(["python", "scripts/paper/evaluate_robustness.py", *command_line]),
            "model": checkpoint.about,
            "split": arguments.split,
            "seed": arguments.seed,
            "results": {},
        }
        for name in arguments.inputs or checkpoint.kinds():
            kind = {"gaia-xp": gaia_xp, "apogee": apogee}[name](arguments)
            report["results"][name] = evaluate(checkpoint, kind, labels, arguments.seed)
        text = as_markdown(report)
        print(text)
        if output:
            write_json(output, report)
            with complete_file(output.with_suffix(".md")) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
            print(f"\nwritten: {output}, {output.with_suffix('.md')}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"evaluate_robustness.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
