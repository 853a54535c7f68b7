# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The radial velocity of a star from its spectrum, by correlation with templates.

Templates are stars of a few temperatures, gravities and metallicities, from the star model of a rung, in the optical
from the emulator of the installed package, otherwise the mean star of the rung. At each trial velocity a template is
correlated with the spectrum, with a linear continuum for each piece. The velocity is at the peak of the correlation;
its error follows from the width of the peak, with flux errors scaled by the misfit, and from the scatter among parts
of the spectrum. It is significant if the peak stands out.
"""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # imports its parts when they are used
import torch

from .basis_spectrafm import SpectrumBasis
from .flags_spectrafm import AIR, AIR_TOLERANCE, MEDIUM_MEASURED, MOVED, MOVED_SIGMA, VELOCITY_MEASURED
from .gate_spectrafm import FRAME_UNSTATED, MEDIUM_UNSTATED, SPEED_OF_LIGHT, to_rest
from .rungs_spectrafm import Rung


LIMIT = 600.0  # km/s, largest trial velocity
STEPS_OF_FWHM = 3.0  # trial velocities in a FWHM
PIECE = 0.004  # in ln wavelength: length over which the continuum is linear
FLOOR = 0.02  # of the flux: error of the templates
CLIPPED_AT = 5.0  # sigma: pixels beyond this in the first fit are left out of the second
# Minimum height of a peak in units of the noise of the correlation, and maximum relative height of the second one.
LEAST_HEIGHT, HIGHEST_SECOND = 7.5, 0.6
# Minimum significance of the lines in sigma of the misfit, and maximum error of the velocity in FWHM.
LEAST_SIGNIFICANCE, GREATEST_ERROR = 7.0, 0.15
AWAY = 3.0  # resolution elements
LEAST_ERROR, ERROR_OF_FWHM = 0.1, 0.01  # km/s, and share of a FWHM, error of the templates
FEWEST_PIXELS, FEWEST_OF_PIECE = 100, 20
#: Teff, logg and metallicity of templates.
TEMPLATES = (
    *((3500.0, 1.0, 0.0), (4200.0, 1.7, -0.2), (4200.0, 1.5, -1.5), (4800.0, 2.6, -0.1)),
    *(
        (3200.0, 5.0, 0.0),
        (3500.0, 4.8, 0.0),
        (3900.0, 4.7, 0.0),
        (5300.0, 4.4, 0.0),
        (6200.0, 4.2, 0.0),
        (5500.0, 3.5, -1.5),
    ),
)
KEPT = 4  # grids whose templates are kept
KEPT_BYTES = 2**26  # of a grid
N_PARTS = 8  # whose velocities are compared
#: In the optical: lowest resolving power with narrow lines; that of the first search; and that of the emulator, which
#: has no narrower lines. Minimum number of resolution elements of a piece; templates have no wider structure.
LEAST_POWER, SEARCH_POWER, HIGHEST_POWER = 1_000.0, 5_000.0, 20_000.0
ELEMENTS_OF_PIECE, CONTINUUM = 40.0, 0.04
#: The noise of the correlation there comes from other lines of the star more than from the flux.
LEAST_EMULATED_HEIGHT = 4.5


NO_LINES = "radial_velocity: expected a spectrum with narrow lines of a range that is known"


@dataclass
class Velocity:
    """
    Attributes
    ----------
    value, error : float
        km/s, positive for a receding star, in the frame of the wavelengths; NaN if it is not significant.
    cause : str
        Why it is not significant; "" if it is.
    """

    value: float = np.nan
    error: float = np.nan
    cause: str = ""


class VelocityMeter:
    """
    Velocities of spectra on any grid.

    Parameters
    ----------
    basis : SpectrumBasis
    model : SpectraFMForPrediction, optional
        Its star model, if it has one, provides templates.
    """

    def __init__(self, basis: SpectrumBasis, model: Any = None) -> None:
        self.basis = basis
        self.star_model: Any = getattr(getattr(model, "refinement", None), "star_model", None)
        known = self.star_model is not None
        self.star_intervals = model.config.star_intervals if known else (0, 0)
        self.star_labels = list(model.config.star_labels) if known else []
        self._templates: dict[int, np.ndarray] = {}
        self._shifted: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, wavelength, flux, flux_error, mask, resolving_power: float | None = None) -> Velocity:
        """
        Parameters
        ----------
        wavelength : array of shape (pixels,)
            Angstrom, vacuum.
        flux, flux_error : array of shape (pixels,)
            Errors may be NaN, where they are unknown.
        mask : array of bool, shape (pixels,)
        resolving_power : float, optional
        """
        wavelength = np.asarray(wavelength, np.float64)
        order = np.argsort(wavelength, kind="stable")
        wavelength, flux, sigma = (
            wavelength[order],
            np.asarray(flux, float)[order],
            np.asarray(flux_error, float)[order],
        )
        good = np.isfinite(wavelength) & np.isfinite(flux) & ~np.asarray(mask, bool)[order]
        good &= np.isnan(sigma) | ((sigma > 0) & np.isfinite(sigma))
        if resolving_power is not None and not np.isfinite(resolving_power):
            resolving_power = None
        rung = self.basis.rung_for(wavelength[good], resolving_power) if good.sum() > 1 else None
        if rung is not None and rung.guesses_power and _emulated() is not None:
            return self._optical(wavelength, flux, sigma, good, rung, resolving_power)
        if rung is None or not self.basis.tells_velocity(wavelength[good], resolving_power):
            return Velocity(cause=NO_LINES)
        low, high = rung.range
        margin = 1 + LIMIT / SPEED_OF_LIGHT
        good &= (wavelength > low * margin) & (wavelength < high / margin)
        if good.sum() < FEWEST_PIXELS:
            return Velocity(cause=f"radial_velocity: expected {FEWEST_PIXELS} pixels, got {int(good.sum())}")
        power = min(resolving_power or rung.resolving_power, rung.resolving_power)
        pieces = _Pieces(wavelength, flux, sigma, good)
        velocities, shifted = self._at_velocities(rung, wavelength, power)
        peaks = np.array([pieces.correlation(template).max() for template in shifted])
        best = int(np.argmax(peaks))
        pieces.clip(shifted[best, int(np.argmax(pieces.correlation(shifted[best])))])
        found = pieces.correlation(shifted[best])
        return self._result(pieces, self._spline(rung, best, power), velocities, found, power)

    def of_stars(self, pixels: dict[str, np.ndarray], resolving_power: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Velocities of several stars and their errors, (stars,) in km/s, from the result of `read_pixels`.

        Raises
        ------
        ValueError
            For a star whose velocity is not significant.
        """
        found = []
        for star, power in enumerate(resolving_power):
            wavelength = pixels["wavelength"][star % len(pixels["wavelength"])]
            error = np.where(pixels["flux_error"][star] > 0, pixels["flux_error"][star], np.nan)
            velocity = self(wavelength, pixels["flux"][star], error, ~pixels["valid"][star], float(power))
            if velocity.cause:
                raise ValueError(f"{velocity.cause} in spectrum {star}")
            found.append((velocity.value, velocity.error))
        values, errors = np.array(found).T
        return values, errors

    def _optical(self, wavelength, flux, sigma, good, rung: Rung, resolving_power: float | None) -> Velocity:
        """With templates of the emulator: first at a power of `SEARCH_POWER`, then at that of the spectrum."""
        low, high = rung.range
        margin = 1 + LIMIT / SPEED_OF_LIGHT
        good = good & (wavelength > low * margin) & (wavelength < high / margin)
        if good.sum() < FEWEST_PIXELS:
            return Velocity(cause=f"radial_velocity: expected {FEWEST_PIXELS} pixels, got {int(good.sum())}")
        step = float(np.median(np.diff(np.log(wavelength[good]))))
        # Two pixels in a FWHM, where it is unknown.
        power = min(resolving_power or 0.5 / max(step, 1e-9), HIGHEST_POWER)
        if power < LEAST_POWER:
            return Velocity(cause=NO_LINES)
        result = Velocity(cause=NO_LINES)
        for level in sorted({min(power, SEARCH_POWER), power}):
            binned = _binned(wavelength, flux, sigma, good, 0.5 / level)
            box = 0.68 * (0.5 / level if binned[0].size < wavelength.size else step)  # FWHM close to that of pixels
            width = np.hypot(1.0 / power, box)
            piece = max(PIECE, ELEMENTS_OF_PIECE / min(power, SEARCH_POWER))
            pieces = _Pieces(*binned, piece)
            if not pieces.slices:
                return Velocity(cause=f"radial_velocity: expected {FEWEST_OF_PIECE} pixels side by side, got fewer")
            searched = result.cause != ""
            if searched:
                velocities, shifted = self._emulated_at(binned[0], width)
                peaks = np.array([pieces.correlation(template).max() for template in shifted])
                best = int(np.argmax(peaks))
                pieces.clip(shifted[best, int(np.argmax(pieces.correlation(shifted[best])))])
                found = pieces.correlation(shifted[best])
            spline = _emulated_spline(best, width)
            if not searched:
                velocities = result.value + SPEED_OF_LIGHT * np.arange(-2.0 / level, 2.0 / level, width / 3)
                near = spline(np.log(pieces.wavelength) - _ln_doppler(velocities)[:, None])
                pieces.clip(near[len(near) // 2])
                found = pieces.correlation(near)
            result = self._result(
                pieces, spline, velocities, found, 1.0 / width, LEAST_EMULATED_HEIGHT if searched else 0.0
            )
            if result.cause:
                return result
        return result

    def _emulated_at(self, wavelength: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
        """As `_at_velocities`."""
        key = (wavelength.tobytes(), round(1.0 / width))
        if key in self._shifted:
            return self._shifted[key]
        step = SPEED_OF_LIGHT * width / STEPS_OF_FWHM
        most = int(LIMIT / step) + int(2 * STEPS_OF_FWHM)  # a peak has two FWHM on both sides
        velocities = step * np.arange(-most, most + 1)
        moved = np.log(np.where(wavelength > 0, wavelength, 1.0)) - _ln_doppler(velocities)[:, None]
        start, dx, stars = _emulated()
        grid = start + dx * np.arange(stars.shape[1])
        templates = [_emulated_lines(number, width) for number in range(len(stars))]
        found = velocities, np.stack([np.interp(moved, grid, each).astype(np.float32) for each in templates])
        if found[1].nbytes < KEPT_BYTES:
            while len(self._shifted) >= KEPT:
                self._shifted.pop(next(iter(self._shifted)))
            self._shifted[key] = found
        return found

    def _result(
        self, pieces: "_Pieces", spline: Any, velocities, found, power: float, least: float = LEAST_HEIGHT
    ) -> Velocity:
        """`least`: height of the peak; 0 where it is known to be significant."""
        width = SPEED_OF_LIGHT / power
        center, peak = velocities[np.argmax(found)], found.max()
        others = found[np.abs(velocities - center) > AWAY * width] if least else np.zeros(1)
        noise = 1.4826 * np.median(np.abs(others - np.median(others)))
        height, second = (peak - np.median(others)) / max(noise, 1e-30), others.max() / max(peak, 1e-30)
        edge = abs(center) > velocities[-1] - 2 * width
        misfit = max(1.0, (pieces.variation - peak**2) / pieces.n_free)
        unseen = peak < LEAST_SIGNIFICANCE * np.sqrt(misfit)
        if least and (edge or unseen or height < least or second > HIGHEST_SECOND):
            if unseen:
                return Velocity(
                    cause=f"radial_velocity: expected lines, got {max(peak, 0) / np.sqrt(misfit):.1f} sigma"
                )
            return Velocity(
                cause="radial_velocity: expected lines that agree on one, got a correlation that is "
                f"{height:.1f} times its noise, and {second:.2f} of its peak at another velocity"
            )
        fine = center + 0.1 * width * np.arange(-5, 6)
        shifted = spline(np.log(pieces.wavelength) - _ln_doppler(fine)[:, None])
        near = pieces.correlation(shifted)
        curve = np.polyfit(fine - center, near**2, 2)
        value = center - curve[1] / (2.0 * curve[0])
        if not (curve[0] < 0 and abs(value - center) < 0.5 * width):
            return Velocity(cause="radial_velocity: expected a peak of the correlation, got none that is round")
        misfit = max(1.0, (pieces.variation - near.max() ** 2) / pieces.n_free)
        error = np.sqrt(misfit / -curve[0]) * pieces.disagreement(shifted, fine - center, 0.5 * width)
        error = float(np.linalg.norm([error, LEAST_ERROR, ERROR_OF_FWHM * width]))
        if error > GREATEST_ERROR * width:
            return Velocity(
                cause="radial_velocity: expected parts of the spectrum that agree on one, got an error of "
                f"{error:.1f} km/s"
            )
        return Velocity(float(value), error)

    def _at_velocities(self, rung: Rung, wavelength: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
        """Trial velocities, and all templates at them on a grid: (templates, velocities, pixels)."""
        key = (rung.first_interval, wavelength.tobytes(), round(power))
        if key not in self._shifted:
            step = SPEED_OF_LIGHT / power / STEPS_OF_FWHM
            velocities = step * np.arange(-int(LIMIT / step), int(LIMIT / step) + 1)
            moved = np.log(np.where(wavelength > 0, wavelength, 1.0)) - _ln_doppler(velocities)[:, None]
            start, stop = rung.start, rung.start + rung.step * (len(rung.mean) - 1)
            number = len(self._own(rung))
            shifted = [self._spline(rung, i, power)(moved.clip(start, stop)).astype(np.float32) for i in range(number)]
            while len(self._shifted) >= KEPT:
                self._shifted.pop(next(iter(self._shifted)))
            self._shifted[key] = velocities, np.stack(shifted)
        return self._shifted[key]

    def _spline(self, rung: Rung, number: int, power: float) -> Any:
        grid = rung.start + rung.step * np.arange(len(rung.mean))
        template = self._own(rung)[number]
        return scipy.interpolate.CubicSpline(grid, _smoothed(template, rung, power))

    def _own(self, rung: Rung) -> np.ndarray:
        """(templates, pixels) on the grid of a rung: the mean star, and stars of the star model where there is one."""
        if rung.first_interval not in self._templates:
            found = [rung.mean]
            if self.star_model is not None and rung.first_interval == self.star_intervals[0]:
                found += list(self._stars(rung))
            self._templates[rung.first_interval] = np.array(found)
        return self._templates[rung.first_interval]

    @torch.no_grad()
    def _stars(self, rung: Rung) -> np.ndarray:
        star = self.star_model
        device = star.center.device
        middle = star.physical(star.population[None])[0]
        labels = middle.repeat(len(TEMPLATES), 1)
        for column, name in enumerate(("teff", "logg", "fe_h")):
            if name in self.star_labels:
                labels[:, self.star_labels.index(name)] = torch.tensor(TEMPLATES, device=device)[:, column]
        low, high = star.limits()
        standardised = star.standardise(labels).clamp(low, high)
        intervals = torch.arange(self.star_intervals[0], self.star_intervals[1], device=device)
        found = star.coefficients(star.weights(standardised), intervals)[0]
        coefficients = found.cpu().numpy()  # stars, intervals, K
        grid = np.exp(rung.start + rung.step * np.arange(len(rung.mean)))
        design = self.basis.design(grid)
        found = np.tile(rung.mean, (len(TEMPLATES), 1))
        for number, pixels, rows in zip(design.intervals, design.pixels, design.rows, strict=True):
            found[:, pixels] = coefficients[:, number - self.star_intervals[0]] @ rows.numpy()
        return found


class _Pieces:
    """A spectrum, cut into pieces, each with a continuum of its own."""

    def __init__(self, wavelength, flux, sigma, good, width: float = PIECE) -> None:
        self.wavelength = wavelength
        position = np.log(np.where(wavelength > 0, wavelength, 1.0))
        number = np.floor((position - position[good][0]) / width).astype(int)
        self.slices = []
        self.x = np.zeros(len(wavelength))
        self.weight, self.flux = np.zeros(len(wavelength)), np.where(good, flux, 0.0)
        for piece in np.unique(number[good]):
            inside = np.flatnonzero(number == piece)
            part = slice(int(inside[0]), int(inside[-1]) + 1)
            use = good[part]
            level = np.median(self.flux[part][use])
            if use.sum() < FEWEST_OF_PIECE or not level > 0:
                continue
            self.slices.append(part)
            self.x[part] = np.linspace(-1.0, 1.0, part.stop - part.start)
            self.flux[part] /= level  # lines of all pieces have the same weight
            noise = np.where(use & ~np.isnan(sigma[part]), sigma[part] / level, FLOOR)
            self.weight[part] = np.where(use, 1.0 / (noise**2 + FLOOR**2), 0.0)

    @property
    def n_free(self) -> int:
        return max(int(np.count_nonzero(self.weight)) - 2 * len(self.slices), 1)

    @property
    def variation(self) -> float:
        """chi^2 of the lines alone."""
        return sum(self._across(self.flux[None, part], part)[1][0] for part in self.slices)

    def correlation(self, templates: np.ndarray) -> np.ndarray:
        """
        Significance of templates (several, pixels), each with its best depth of lines and a linear continuum in each
        piece: (several,). Its square is the decrease of chi^2 by the template; negative for inverted lines.
        """
        together, power = np.zeros(len(templates)), np.zeros(len(templates))
        for part in self.slices:
            both, own = self._across(templates[:, part], part)
            together += both
            power += own
        return together / np.sqrt(np.maximum(power, 1e-30))

    def disagreement(self, templates: np.ndarray, offsets: np.ndarray, most: float) -> float:
        """
        Scatter of the velocities of parts of the spectrum over their errors, at least 1: templates of another type of
        star shift each part differently.
        """
        values, weights = [], []
        for slices in np.array_split(np.arange(len(self.slices)), min(N_PARTS, len(self.slices))):
            parts = [self.slices[i] for i in slices]
            both, own = np.sum([self._across(templates[:, part], part) for part in parts], axis=0)
            curve = np.polyfit(offsets, np.sign(both) * both**2 / np.maximum(own, 1e-30), 2)
            if curve[0] < 0:
                values.append(float(np.clip(-curve[1] / (2.0 * curve[0]), -most, most)))
                weights.append(-curve[0])
        if len(values) < 3:
            return 1.0
        mean = np.average(values, weights=weights)
        return float(np.sqrt(max(1.0, np.sum(weights * (values - mean) ** 2) / (len(values) - 1))))

    def _across(self, templates, part) -> tuple[np.ndarray, np.ndarray]:
        """Products of templates with the flux, and with themselves, without the straight lines in either."""
        weight, x = self.weight[part], self.x[part]
        lines = np.stack([np.ones(len(x)), x])
        inverse = np.linalg.inv((lines * weight) @ lines.T)
        own = templates @ (lines * weight).T  # several, 2
        flux = (lines * weight) @ self.flux[part]
        squares = templates.astype(np.float64) ** 2 @ weight - np.einsum("ti,ij,tj->t", own, inverse, own)
        return templates @ (weight * self.flux[part]) - own @ inverse @ flux, np.maximum(squares, 0.0)

    def clip(self, template: np.ndarray) -> None:
        """Mask pixels far from the template, such as residuals of the sky."""
        products = [self._across(template[None, part], part) for part in self.slices]
        depth = sum(both[0] for both, _ in products) / max(sum(own[0] for _, own in products), 1e-30)
        for part in self.slices:
            left = self.flux[part] - depth * template[part]
            lines = np.stack([np.ones(len(left)), self.x[part]])
            weighted = lines * self.weight[part]
            left = left - (np.linalg.inv(weighted @ lines.T) @ weighted @ left) @ lines
            deviation = np.abs(left) * np.sqrt(self.weight[part])
            scale = max(1.0, 1.4826 * float(np.median(deviation[self.weight[part] > 0])))
            kept = deviation <= CLIPPED_AT * scale
            if np.count_nonzero(kept & (self.weight[part] > 0)) >= FEWEST_OF_PIECE:
                self.weight[part] = np.where(kept, self.weight[part], 0.0)


@functools.lru_cache(maxsize=1)
def _emulated() -> Any:
    """
    ln of the first wavelength, step and flux (templates, pixels) of stars in the optical: the package that is installed
    has the emulator. A checkpoint that is loaded without it has the mean star of its rungs.
    """
    try:
        return importlib.import_module("spectrafm_hf.synthesis.velocity_templates").velocity_templates()
    except ImportError:
        return None


@functools.lru_cache(maxsize=64)
def _emulated_lines(number: int, width: float) -> np.ndarray:
    """A template with a line width of FWHM `width` in ln wavelength, divided by its continuum."""
    _, step, stars = _emulated()
    flux = stars[number].astype(np.float64)
    box = round(CONTINUUM / step)
    once = scipy.ndimage.uniform_filter1d(flux, box, mode="nearest")
    continuum = scipy.ndimage.uniform_filter1d(once, box, mode="nearest")
    return _blurred(flux, width / 2.3548 / step) / continuum


@functools.lru_cache(maxsize=16)
def _emulated_spline(number: int, width: float) -> Any:
    start, step, stars = _emulated()
    return scipy.interpolate.CubicSpline(start + step * np.arange(stars.shape[1]), _emulated_lines(number, width))


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    return scipy.ndimage.gaussian_filter1d(values, sigma, mode="nearest") if sigma > 0.3 else values


def _binned(wavelength, flux, sigma, good, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same in bins of a step in ln wavelength, where pixels are finer than two thirds of it."""
    if np.median(np.diff(np.log(wavelength[good]))) > 0.67 * step:
        return wavelength, flux, sigma, good
    position, flux, sigma = np.log(wavelength[good]), flux[good], sigma[good]
    number = np.floor((position - position[0]) / step).astype(int)
    unknown = np.isnan(sigma)
    weight = np.where(unknown, 0.0, sigma) ** -2.0 if not unknown.any() else np.ones(len(flux))
    total = np.bincount(number, weight)
    there = total > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [np.bincount(number, weight * values) / total for values in (position, flux)]
        error = np.full(len(total), np.nan) if unknown.any() else total**-0.5
    empty = position[0] + step * (np.arange(len(total)) + 0.5)
    return np.exp(np.where(there, means[0], empty)), np.where(there, means[1], 0.0), error, there


def _ln_doppler(velocity: np.ndarray) -> np.ndarray:
    """ln of observed over rest wavelength."""
    beta = velocity / SPEED_OF_LIGHT
    return 0.5 * (np.log1p(beta) - np.log1p(-beta))


def _smoothed(template: np.ndarray, rung: Rung, power: float) -> np.ndarray:
    if power * 1.03 >= rung.resolving_power:
        return template
    sigma = np.sqrt(power**-2.0 - rung.resolving_power**-2.0) / 2.3548 / rung.step
    reach = int(np.ceil(4 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(template, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


# ------------------------------------------------------------------------------------------------------ rows of a file


def measured(meter: VelocityMeter, row: Mapping[str, Any]) -> Velocity:
    """Measurements from the lines of a row."""
    return meter(row["wavelength"], row["flux"], row["flux_error"], row["mask"], row.get("resolving_power"))


def moved_to_rest(row: Mapping[str, Any], velocity: float, flags: list[str]) -> dict[str, Any]:
    """A row whose star recedes with `velocity` (km/s), at rest, with these flags."""
    wavelength = to_rest(np.asarray(row["wavelength"], np.float64), velocity)
    return {**row, "wavelength": wavelength, "rest_frame": True, "flags": flags}


def settled_row(meter: VelocityMeter, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    If its frame or medium is not stated, shift a row by the velocity of its lines, with the flag `velocity_measured` or
    `medium_measured`. Without a significant velocity it is unchanged.
    """
    flags = list(row.get("flags") or ())
    unstated = {FRAME_UNSTATED, MEDIUM_UNSTATED} & set(flags)
    if row.get("refused") or not (unstated or row.get("rest_frame") is False):
        return row
    found = measured(meter, row)
    if found.cause:
        return row
    flags = [flag for flag in flags if flag not in unstated]
    if abs(found.value) > max(MOVED, MOVED_SIGMA * found.error):
        in_air = MEDIUM_UNSTATED in unstated and abs(found.value - AIR) <= AIR_TOLERANCE
        flags.append(MEDIUM_MEASURED if in_air else VELOCITY_MEASURED)
    return moved_to_rest(row, found.value, flags)


__all__ = ["Velocity", "VelocityMeter", "settled_row"]
