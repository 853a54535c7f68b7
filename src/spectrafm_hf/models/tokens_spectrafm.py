# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Pixels of stars -> tokens: evidence of the intervals of a basis, or fluxes one by one, as in the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .basis_spectrafm import Evidence, SpectrumBasis
from .configuration_spectrafm import PADDING_ID
from .flags_spectrafm import QUALITY
from .inputs_spectrafm import HUGE, optional_per_star, per_star
from .rungs_spectrafm import Rung, interpolated


# Unknown errors are first set to this fraction of the level, then to the residuals of the fit.
UNKNOWN_ERROR = 0.02
LARGE = 1e12  # of a standardised flux, whose square must fit into float32


# ------------------------------------------------------------------------------------------------------------ evidence


@dataclass
class EvidenceOnGrid:
    """
    Evidence of stars on one grid, and its design.

    Attributes
    ----------
    stars : int array of shape (B,)
        Indices of the input stars.
    wavelength : array of shape (pixels,)
        Angstrom, vacuum, rest frame, increasing.
    flux, inverse_variance : array of shape (B, pixels)
        In the unit of the input; 0 for unused pixels.
    resolving_power : float, optional
    evidence : Evidence
    finer : EvidenceOnGrid, optional
        The same stars at a higher resolving power, if there is one, to detect lines that are not at rest.
    """

    stars: np.ndarray
    wavelength: np.ndarray
    flux: np.ndarray
    inverse_variance: np.ndarray
    resolving_power: float | None
    evidence: Evidence
    finer: "EvidenceOnGrid | None" = None

    def rung_of(self, basis: SpectrumBasis) -> tuple[int, Rung]:
        """Number of the rung of the evidence, and the rung."""
        return next((i, rung) for i, rung in enumerate(basis.rungs) if rung.has(self.evidence.intervals))


def evidence_on_grids(
    basis: SpectrumBasis, pixels: dict[str, np.ndarray], resolving_power: Any = None, normalised: Any = None
) -> list[EvidenceOnGrid]:
    """
    Evidence of all stars; those that share grid and resolving power are handled together.

    Parameters
    ----------
    basis : SpectrumBasis
    pixels : dict
        Of [`read_pixels`].
    resolving_power, normalised : float, bool, or array of shape (stars,), optional
        As in a call of [`SpectraFMTokenizer`].

    Raises
    ------
    ValueError
        For resolving powers that are not positive.
    """
    wavelength, flux, error, valid = (pixels[name] for name in ("wavelength", "flux", "flux_error", "valid"))
    n_stars = len(flux)
    powers = optional_per_star("resolving_power", resolving_power, n_stars)
    if np.any(wrong := ~(np.isnan(powers) | ((powers > 0) & (powers < HUGE)))):
        raise ValueError(f"resolving_power: expected positive numbers, got {powers[wrong][0]:g}")
    normalised = optional_per_star("normalised", normalised, n_stars)
    groups: dict[tuple[bytes, str], list[int]] = {}
    for star in range(n_stars):
        grid = wavelength[star].tobytes() if len(wavelength) > 1 else b""
        groups.setdefault((grid, str(powers[star])), []).append(star)
    found = []
    for stars in groups.values():
        row = wavelength[stars[0] % len(wavelength)]
        here = np.isfinite(row)
        if not here.any():
            continue
        values, sigma, good = (_chosen(array, stars, here) for array in (flux, error, valid))
        own, power = normalised[stars], None if np.isnan(powers[stars[0]]) else float(powers[stars[0]])
        known: Any = (good & (sigma > 0)).any(axis=1)
        if not known.all():
            guess = UNKNOWN_ERROR * np.mean(np.abs(values), axis=1, where=good, keepdims=True)
            sigma = np.where(known[:, None], sigma, np.where(guess > 0, guess, 1.0))
        row, values, weight, power = basis.brought_down(row[here], values, _inverse_variance(sigma, good), power)
        evidence = basis.evidence(row, values, weight, power, own)
        if not known.all():
            misfit = np.array([np.nanmedian(star) if np.isfinite(star).any() else 1.0 for star in evidence.misfit])
            weight /= np.where(known, 1.0, np.maximum(misfit, 1e-6))[:, None]
            evidence = basis.evidence(row, values, weight, power, own)
        on_grid = EvidenceOnGrid(np.array(stars), row, values, weight, power, evidence)
        smoother = basis.brought_further(row, values, np.where(evidence.clipped, 0.0, weight), power)
        if smoother is not None:
            on_grid = EvidenceOnGrid(on_grid.stars, *smoother, basis.evidence(*smoother, own), on_grid)
        found.append(on_grid)
    return found


def evidence_inputs(
    basis: SpectrumBasis, found: list[EvidenceOnGrid], pixels: dict[str, np.ndarray], return_quality: bool = False
) -> dict[str, np.ndarray]:
    """Inputs of the model (coefficients of all intervals in which any star has pixels) and of the flags."""
    error, valid = pixels["flux_error"], pixels["valid"]
    n_stars = len(valid)
    # All intervals of a rung, so that stars with different missing ones can be stacked.
    rungs = [rung for rung in basis.rungs if any(rung.has(grid.evidence.intervals) for grid in found)]
    intervals = np.concatenate(
        [rung.first_interval + np.arange(rung.n_intervals) for rung in rungs] or [np.zeros(0, int)]
    )
    intervals = intervals.astype(np.int64)
    shape = (n_stars, len(intervals), basis.n_coefficients)
    inputs = {
        "coefficients": np.zeros(shape, np.float32),
        "reliability": np.zeros(shape, np.float32),
        "interval_ids": np.tile(intervals, (n_stars, 1)),
        "attention_mask": np.zeros(shape[:2], bool),
        "estimate": np.zeros(shape, np.float32),
        "information": np.zeros((shape[1], n_stars, shape[2], shape[2]), np.float32).swapaxes(0, 1),
        "pull": np.zeros(shape, np.float32),
        "misfit": np.full(shape[:2], np.nan, np.float32),
    }
    quality = {name: np.zeros(n_stars, np.float32) for name in QUALITY}
    for grid in found:
        stars, evidence = grid.stars, grid.evidence
        columns = np.searchsorted(intervals, evidence.intervals)
        rows = slice(None) if len(stars) == n_stars else np.array(stars)
        for name, values in inputs.items():
            if name == "information" and evidence.whole_information.shape == values.shape:
                inputs[name] = evidence.whole_information  # not copied, as it is large
                continue
            own = evidence.seen if name == "attention_mask" else getattr(evidence, name, None)
            if own is not None and own.shape == values.shape:
                inputs[name] = own
            elif own is not None:
                for number, column in enumerate(columns):
                    values[rows, column] = own[:, number]
        fine = grid.finer or grid
        share, known = np.zeros(len(stars)), (error[rows] > 0).any(axis=1)
        if fine.evidence.clipped.any():
            share = fine.evidence.clipped.sum(axis=1) / np.maximum(valid[rows].sum(axis=1), 1)
        quality["clipped"][stars] = share
        if return_quality:
            rung = basis.rung_for(grid.wavelength, grid.resolving_power)
            quality["signal"][stars], quality["outside"][stars] = _signal(rung, grid), _outside(rung, grid)
        strange: Any = np.flatnonzero(basis.strange(fine.evidence, share) & known) if return_quality else []
        if len(strange) and basis.tells_velocity(fine.wavelength, fine.resolving_power):
            quality["shift"][stars[strange]] = basis.shifts(
                fine.wavelength,
                fine.flux[strange],
                fine.inverse_variance[strange].astype(np.float64),
                fine.resolving_power,
            )
    return inputs | (quality if return_quality else {})


def _signal(rung: Rung | None, grid: EvidenceOnGrid) -> np.ndarray:
    """Mean flux of all pixels that the tokens come from, over its error, (stars,); infinite without such pixels."""
    if rung is None:
        return np.full(len(grid.stars), np.inf)
    low, high = rung.range
    here = slice(np.searchsorted(grid.wavelength, low), np.searchsorted(grid.wavelength, high, side="right"))
    weight = grid.inverse_variance[:, here]
    total, flux = (part.sum(axis=1).astype(float) for part in (weight, weight * grid.flux[:, here]))
    return np.where(total > 0, flux / np.sqrt(np.where(total > 0, total, 1.0)), np.inf)


def _outside(rung: Rung | None, grid: EvidenceOnGrid) -> np.ndarray:
    """Share of the pixels that count whose wavelengths the rung does not have, (stars,)."""
    if rung is None:
        return np.zeros(len(grid.stars))
    low, high = rung.range
    beyond = (grid.wavelength < low) | (grid.wavelength > high)
    counts = grid.inverse_variance > 0
    return (counts & beyond).sum(axis=1) / np.maximum(counts.sum(axis=1), 1)


def fluxes_over_median(found: list[EvidenceOnGrid], wavelength: np.ndarray, n_stars: int) -> np.ndarray:
    """Fluxes over their medians at other wavelengths, (stars, wavelengths), NaN where unknown."""
    fluxes = np.full((n_stars, len(wavelength)), np.nan, np.float32)
    for each in found:
        flux = np.where(each.inverse_variance > 0, each.flux, np.nan)
        nothing = np.isnan(flux).all(axis=1, keepdims=True)
        level = np.nanmedian(np.where(nothing, 1.0, flux), axis=1, keepdims=True)
        fluxes[each.stars] = interpolated(each.wavelength, flux / np.where(level > 0, level, 1.0), wavelength)
    return fluxes


def _chosen(array: np.ndarray, stars: Any, pixels: np.ndarray) -> np.ndarray:
    """(stars, pixels) -> those of some stars and pixels; a view where these are all."""
    array = array if len(stars) == len(array) else array[stars]
    return array if pixels.all() else array[:, pixels]


def _inverse_variance(error: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of the shape of both, 0 where a pixel does not count; float64 where float32 could not hold it."""
    whole = counts.all()
    error = error if whole else np.where(counts, error, 1.0)
    if not (error.min() > 1e-9 and error.max() < 1e9):
        error = np.maximum(error.astype(np.float64, copy=False), 1e-100)
    found = 1.0 / (error * error)  # a power of -2 takes longer
    return found if whole else np.where(counts, found, np.zeros((), error.dtype))


# --------------------------------------------------------------------------------------------------- fluxes one by one


@dataclass
class Standardisation:
    """
    Flux becomes (flux - center) / scale: two numbers, or two tables at increasing `wavelength` (Angstrom).

    Raises
    ------
    ValueError
        Names the setting of the tokenizer, the expectation and the value.
    """

    wavelength: Any
    center: Any
    scale: Any

    def __post_init__(self) -> None:
        grid = self.wavelength
        if grid is not None and not (np.ndim(grid) == 1 and np.all(np.diff(grid) > 0)):
            found = np.array2string(np.asarray(grid), threshold=4)
            raise ValueError(f"standardize_wavelength: expected increasing wavelengths, got {found}")
        shape = () if grid is None else np.shape(grid)
        for field, value in (("standardize_center", self.center), ("standardize_scale", self.scale)):
            if np.shape(value) != shape:
                raise ValueError(
                    f"{field}: expected the shape of standardize_wavelength, {shape}, got {np.shape(value)}"
                )
        if not (lowest := np.min(self.scale)) > 0:
            raise ValueError(f"standardize_scale: expected positive numbers, got {lowest:g}")

    def at(self, wavelength: np.ndarray) -> tuple[Any, Any]:
        """Center and scale at each wavelength."""
        if self.wavelength is None:
            return self.center, self.scale
        center, scale = (np.interp(wavelength, self.wavelength, table) for table in (self.center, self.scale))
        return center, scale


def flux_inputs(
    pixels: dict[str, np.ndarray],
    standard: Standardisation,
    valid_flux: Any,
    clip: float | None,
    max_length: int | None,
    rng: np.random.Generator | None,
) -> dict[str, np.ndarray]:
    """
    Inputs of the model, (stars, tokens) each: standardised fluxes of usable pixels.

    At most `max_length` pixels are kept, at random, or without `rng` evenly spread.
    """
    wavelength, flux, valid = pixels["wavelength"], pixels["flux"], pixels["valid"]
    if valid_flux is not None:
        with np.errstate(over="ignore"):
            low, high = np.asarray(valid_flux, flux.dtype)
        valid = valid & (flux >= low) & (flux <= high)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        center, scale = (np.asarray(table, flux.dtype) for table in standard.at(wavelength))
        flux = ((flux - center) / scale).astype(np.float32, copy=False)
        valid = valid & (np.abs(flux) <= np.float32(LARGE if clip is None else min(clip, LARGE)))
    if valid.shape[1] and not np.all(good := valid.any(axis=1)):
        raise ValueError(
            f"flux: expected a pixel within valid_flux={valid_flux} and clip={clip} in each spectrum, "
            f"got none in spectrum {np.argmin(good)}"
        )
    chosen, keep = _choose(valid, max_length, rng)
    if valid.shape[1] == 0:
        return {"flux": flux, "wavelength": flux.copy(), "attention_mask": keep}
    taken = (np.take_along_axis(np.broadcast_to(x, valid.shape), chosen, axis=1) for x in (flux, wavelength))
    flux, wavelength = (np.where(keep, values, 0.0).astype(np.float32) for values in taken)
    return {"flux": flux, "wavelength": wavelength, "attention_mask": keep}


def _choose(
    usable: np.ndarray, max_length: int | None, rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """
    At most `max_length` usable pixels of each star, at random, or without `rng` evenly spread.

    (stars, pixels) -> indices of the pixels that stay, in order, and which of them are real: (stars, kept).
    """
    count = usable.sum(axis=1)
    n_kept = int(count.max(initial=0))
    if max_length is not None and max_length < n_kept:
        n_kept = max_length
        if rng is not None:
            draw = np.where(usable, rng.random(usable.shape), np.inf)
            usable = usable & (draw <= np.partition(draw, n_kept - 1, axis=1)[:, [n_kept - 1]])
            count = usable.sum(axis=1)
    kept = np.minimum(count, n_kept)[:, None]
    position = np.arange(n_kept)
    keep = position < kept
    # Evenly spread among the usable pixels of a star; all of them where all are kept.
    rank = (2 * position + 1) * count[:, None] // np.maximum(2 * kept, 1)
    tokens = np.nonzero(usable)[1]
    before = (np.cumsum(count) - count)[:, None]
    chosen = np.zeros(keep.shape, dtype=int)
    chosen[keep] = tokens[(before + rank)[keep]]
    return chosen, keep


# -------------------------------------------------------------------------------------------------- scalars and labels


def scalar_inputs(scalars: Mapping[str, Any], ids: np.ndarray, n_stars: int) -> dict[str, np.ndarray]:
    """Scalars that are known (finite), with their ids, pushed to the left; padding has id 0."""
    values = np.stack([per_star(f"scalars[{name!r}]", scalars[name], n_stars) for name in scalars], axis=1)
    known = np.abs(values) < HUGE
    order = np.argsort(~known, axis=1, kind="stable")[:, : int(known.sum(axis=1).max())]
    known, values = (np.take_along_axis(array, order, axis=1) for array in (known, values))
    return {
        "scalar_ids": np.where(known, ids[order], PADDING_ID),
        "scalar_values": np.where(known, values, 0.0).astype(np.float32),
    }


def scalars_with_errors(scalars: Mapping[str, Any], names: Sequence[str], n_stars: int) -> dict[str, np.ndarray]:
    """`scalars` (stars, names, 2), values and errors, NaN where unknown; empty if there are none."""
    columns = {column: name for name in names for column in (name, f"{name}_err")}
    if missing := [name for name in names if name not in scalars]:
        if not scalars:
            return {}
        raise ValueError(f"scalars: expected {', '.join(names)} (NaN where unknown), got none of {', '.join(missing)}")
    if unknown := sorted(scalars.keys() - columns.keys()):
        raise ValueError(f"scalars: expected names out of {list(columns)}, got {unknown}")
    found = np.full((n_stars, len(columns)), np.nan)
    for number, column in enumerate(columns):
        values = per_star(f"scalars[{column!r}]", scalars.get(column), n_stars)
        found[:, number] = np.where(np.abs(values) < HUGE, values, np.nan)
    return {"scalars": found.reshape(n_stars, len(names), 2).astype(np.float32)}


def label_inputs(
    labels: Mapping[str, Any], label_errors: Mapping[str, Any], ids: Mapping[str, int], request_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """True values and their errors in the shape of the requests; NaN where unknown."""
    outputs = {}
    for field, columns in (("labels", labels), ("label_errors", label_errors)):
        table = np.full((len(request_ids), 1 + max(max(ids.values()), int(request_ids.max()))), np.nan)
        for name, values in columns.items():
            column = per_star(f"{field}[{name!r}]", values, len(request_ids))
            lowest = -HUGE if field == "labels" else 0.0
            if np.any(wrong := (column < lowest) | (column > HUGE)):
                expected = "finite numbers" if field == "labels" else "positive numbers"
                raise ValueError(f"{field}[{name!r}]: expected {expected} or NaN, got {column[wrong][0]:g}")
            table[:, ids[name]] = column
        # Always with errors: the Trainer evaluates only batches with all labels of `forward`.
        outputs[field] = np.take_along_axis(table, request_ids, axis=1).astype(np.float32)
    return outputs
