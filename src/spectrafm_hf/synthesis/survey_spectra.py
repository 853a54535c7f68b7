# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Spectra of the optical as surveys and instruments at random would see stars of known labels, pixel by pixel.

The tokens of `survey_stars.py` are drawn without pixels, for training. These are for what is found out of the trained
model: how large its errors are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.mixture import Columns
from ..models.rungs_spectrafm import degraded
from .bases import OBSERVED_POWER
from .instruments import Instrument
from .survey_grid import SurveyGrid
from .survey_observed import LABELS, LikeObserved
from .survey_stars import POWER_ERROR
from .synthetic import ALPHA_ELEMENTS, load_emulator


Array = NDArray[Any]
Ranges = Sequence[tuple[float, float]]
#: Surveys, and the resolving power that their spectra are said to have.
SURVEYS = {"lamost-lrs": 1_800.0, "sdss-boss": 2_000.0, "desi": 3_500.0, "galah": 28_000.0, "gaia-rvs": 11_500.0}
#: First and last wavelength (Angstrom, vacuum) of their arms and windows.
RANGES: dict[str, Ranges] = {
    "lamost": ((3_700.0, 9_083.0),),
    "galah": ((4_714.0, 4_902.0), (5_649.0, 5_872.0), (6_479.0, 6_737.0), (7_585.0, 7_887.0)),
    "desi b": ((3_600.0, 5_780.0),),
    "desi r": ((5_781.0, 7_562.0),),
    "desi z": ((7_563.0, 9_824.0),),
    "rvs": ((8_460.0, 8_700.0),),
}
NO_SPREAD = 1e6  # resolving power of the emulator, which has no line spread function
NARROWEST = 0.04  # ln of the last over the first wavelength of a window
LEAST_PIXELS = 20
AT_ONCE = 250  # spectra of the emulator
SNR = (12.0, 300.0)
COLOUR = 0.5  # of ln flux, per unit of ln wavelength, that calibrations and dust change it by
COOLEST = 3_500.0  # K: of cooler stars the emulator has flux below zero
FLOOR = 0.02  # of the median flux, that noise does not fall below


class DrawnSpectra(NamedTuple):
    """
    Rows of spectra that share a grid, the number of each star, and columns of their labels.

    `kind` is `observed` or `synthetic`; `name` that of the survey, or what was done to the spectra.
    """

    kind: str
    name: str
    rows: list[dict[str, Any]]
    stars: Array
    labels: Columns


def rows_of(wavelength: Array, flux: Array, error: Array, mask: Array, power: float) -> list[dict[str, Any]]:
    """Rows of spectra (stars, pixels) with one resolving power."""
    return [
        {
            "object_id": str(i),
            "wavelength": wavelength,
            "flux": values.astype(np.float32),
            "flux_error": errors.astype(np.float32),
            "mask": bad,
            "resolving_power": power,
        }
        for i, (values, errors, bad) in enumerate(zip(flux, error, np.broadcast_to(mask, flux.shape), strict=True))
    ]


def within(wavelength: Array, ranges: Ranges) -> NDArray[np.bool_]:
    """(pixels,): which lie in one of the ranges."""
    return np.any([(wavelength > low) & (wavelength < high) for low, high in ranges], axis=0)


def drawn_range(limits: tuple[float, float], generator: np.random.Generator) -> Ranges:
    """A window between two wavelengths, as likely to be narrow as wide."""
    low, high = np.log(limits)
    width = np.exp(generator.uniform(np.log(NARROWEST), np.log(high - low)))
    first = generator.uniform(low, high - width)
    return ((float(np.exp(first)), float(np.exp(first + width))),)


def drawn_snr(n: int, generator: np.random.Generator) -> Array:
    """Signal-to-noise ratios (stars, 1)."""
    low, high = np.log(SNR)
    return np.exp(generator.uniform(low, high, (n, 1)))


def seen_at_random(
    wavelength: Array,
    flux: Array,
    mask: Array,
    power: float,
    limits: tuple[float, float],
    ranges: Ranges,
    generator: np.random.Generator,
) -> list[dict[str, Any]]:
    """
    Spectra (stars, pixels) of a resolving power as an instrument of a lower one, between `limits`, would see them in
    some ranges: with noise, another slope of the flux, and a resolving power that is not quite the stated one. Empty
    where hardly any pixels are left.
    """
    stated = float(np.exp(generator.uniform(*np.log(limits))))
    wrong = POWER_ERROR * np.clip(generator.standard_normal(), -2.0, 2.0)
    true = min(stated * (1.0 + wrong), 0.98 * power)
    grid, seen, counts = degraded(wavelength, flux.astype(float), np.where(mask, 0.0, 1.0), power, true)
    chosen = within(grid, ranges)
    if chosen.sum() < LEAST_PIXELS:
        return []
    grid, seen, counts = grid[chosen], seen[:, chosen], counts[:, chosen]
    x = np.log(grid / np.median(grid))
    slope, bend = COLOUR * generator.standard_normal((2, len(seen), 1))
    seen = seen * np.exp(slope * x + bend * x**2)
    level = np.median(seen, axis=1, keepdims=True)
    error = np.sqrt(np.abs(level) * np.maximum(seen, FLOOR * np.abs(level))) / drawn_snr(len(seen), generator)
    noisy = seen + error * generator.standard_normal(seen.shape)
    return rows_of(grid, noisy, error, counts == 0, stated)


def observed_spectra(stars: Columns, n_drawn: int, generator: np.random.Generator) -> Iterator[DrawnSpectra]:
    """
    Observed stars (see [`observed_stars`]) as they are, cut to the ranges of surveys, and `n_drawn` times as other
    instruments would see them.
    """
    wavelength, flux, mask = np.asarray(stars["wavelength"]), stars["flux"], stars["mask"]
    numbers, known = np.arange(len(flux)), {name: stars[name] for name in LABELS}
    unknown = np.full(flux.shape, np.nan)  # errors, which the library does not state

    def as_they_are(name: str, bad: Array) -> DrawnSpectra:
        return DrawnSpectra("observed", name, rows_of(wavelength, flux, unknown, bad, OBSERVED_POWER), numbers, known)

    yield as_they_are("whole", mask)
    own = {name: ranges for name, ranges in RANGES.items() if within(wavelength, ranges).sum() > LEAST_PIXELS}
    for name, ranges in own.items():
        yield as_they_are(name, mask | ~within(wavelength, ranges))
    for number in range(n_drawn):
        ranges = list(own.values())[number] if number < len(own) else drawn_range((3_550.0, 7_400.0), generator)
        args = wavelength, flux, mask, OBSERVED_POWER, (500.0, 2_000.0), ranges, generator
        if rows := seen_at_random(*args):
            yield DrawnSpectra("observed", "drawn", rows, numbers, known)


def synthetic_spectra(
    grid: SurveyGrid, like: LikeObserved, n_stars: int, n_drawn: int, generator: np.random.Generator
) -> Iterator[DrawnSpectra]:
    """
    Synthetic stars that look as observed ones do: `n_stars` through each of the surveys, and as many for all of
    `n_drawn` other instruments together.
    """
    first, each = 0, -(-n_stars // n_drawn)

    def stars(n: int) -> tuple[dict[str, Array], Columns]:
        labels = grid.labels(2 * n, generator)
        chosen = np.flatnonzero(labels["teff"] > COOLEST)[:n]
        labels = {name: values[chosen] for name, values in labels.items()}
        alpha = np.mean([labels[name] for name in ALPHA_ELEMENTS], axis=0)
        return labels, {name: labels[name] for name in LABELS} | {"alpha_m": alpha}

    labels, known = stars(n_stars)
    first = len(known["teff"])
    wavelength, lines, flux = spectra_of(labels)
    for name, power in SURVEYS.items():
        factor = factor_like(like, wavelength, lines, labels, generator)
        rows = of_survey(Instrument.load(name), power, wavelength, lines, flux, factor, generator)
        yield DrawnSpectra("synthetic", name, rows, np.arange(first), known)
    for number in range(n_drawn):
        labels, known = stars(each)
        wavelength, lines, flux = spectra_of(labels)
        flux = flux * factor_like(like, wavelength, lines, labels, generator)
        chosen = list(RANGES.values())[number // 3 % len(RANGES)]
        ranges = drawn_range((3_310.0, 10_290.0), generator) if number % 3 else chosen
        args = wavelength, flux, np.zeros(flux.shape, bool), NO_SPREAD
        if rows := seen_at_random(*args, (420.0, 5_000.0), ranges, generator):
            yield DrawnSpectra("synthetic", "drawn", rows, first + np.arange(len(rows)), known)
        first += len(rows)


@torch.no_grad()
def spectra_of(labels: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Of the emulator: wavelengths (pixels,); spectra over their continuum, and with it, (stars, pixels) each."""
    emulator = load_emulator("emulator-optical").eval()
    table = torch.from_numpy(emulator.label_table(labels))
    parts = [emulator.positive(part) for part in table.split(AT_ONCE)]
    lines, flux = torch.cat([lines for lines, _ in parts]), torch.cat([lines * level for lines, level in parts])
    return emulator.wavelength.double().numpy(), lines.float().numpy(), flux.float().numpy()


def factor_like(
    like: LikeObserved, wavelength: Array, lines: Array, labels: Mapping[str, Array], generator: np.random.Generator
) -> Array:
    """(stars, pixels): by which synthetic spectra are multiplied so that they look as observed ones."""
    added = like.added(wavelength, labels, generator) / np.maximum(lines, 0.05)
    return np.maximum(1.0 + added, 0.05)


def of_survey(
    instrument: Instrument,
    power: float,
    wavelength: Array,
    lines: Array,
    flux: Array,
    factor: Array,
    generator: np.random.Generator,
) -> list[dict[str, Any]]:
    """Rows of synthetic stars through a survey, from spectra over their continuum and with it."""
    flux = lines if instrument.normalisation == "continuum" else flux
    clean = instrument.apply(wavelength, flux * factor, generator)["clean"]
    error = np.abs(clean) / drawn_snr(len(clean), generator)
    noisy = clean + error * generator.standard_normal(clean.shape)
    return rows_of(instrument.wavelength, noisy, error, instrument.mask, power)
