# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The radial velocity of a star from its spectrum, by correlation with templates.

Templates are the mean star of a rung and, where there is a star model of it, stars of a few temperatures, gravities and
metallicities. At each trial velocity the lines of a template are compared with those of the spectrum, beside a straight
line for the continuum of each piece of it. The velocity is where they go along best; its error follows from how sharp
that peak is, with errors of the flux that are as large as the misfit says. It counts where the peak stands out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline

from .basis_spectrafm import Rung, SpectrumBasis
from .gate_spectrafm import SPEED_OF_LIGHT


LIMIT = 600.0  # km/s that are tried
STEPS_OF_FWHM = 3.0  # of the trial velocities
PIECE = 0.004  # in ln wavelength: over it the continuum is a straight line
FLOOR = 0.02  # of the flux: what templates are wrong by anyway
CLIPPED_AT = 5.0  # sigma: pixels beyond in the first fit play no part in the second
# A peak counts where it is so many times higher than the noise of the correlation, and no other one is nearly as high.
LEAST_HEIGHT, HIGHEST_SECOND = 7.5, 0.6
AWAY = 3.0  # resolution elements
LEAST_ERROR = 0.1  # km/s that templates are wrong by anyway
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


@dataclass
class Velocity:
    """
    Attributes
    ----------
    value, error : float
        km/s, positive for a star that recedes, in the frame of the wavelengths; NaN where it is not significant.
    cause : str
        Why there is none; "" where there is one.
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
        Whose star model gives templates, if it has one.
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
        if rung is None or not self.basis.tells_velocity(wavelength[good], resolving_power):
            return Velocity(cause="radial_velocity: expected a spectrum with narrow lines of a range that is known")
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

    def _result(self, pieces: "_Pieces", spline: CubicSpline, velocities, found, power: float) -> Velocity:
        width = SPEED_OF_LIGHT / power
        center, peak = velocities[np.argmax(found)], found.max()
        others = found[np.abs(velocities - center) > AWAY * width]
        noise = 1.4826 * np.median(np.abs(others - np.median(others)))
        height, second = (peak - np.median(others)) / max(noise, 1e-30), others.max() / max(peak, 1e-30)
        edge = abs(center) > LIMIT - 2 * width
        if edge or peak <= 0 or height < LEAST_HEIGHT or second > HIGHEST_SECOND:
            return Velocity(
                cause="radial_velocity: expected lines that agree on one, got a correlation that is "
                f"{height:.1f} times its noise, and {second:.2f} of its peak at another velocity"
            )
        fine = center + 0.1 * width * np.arange(-5, 6)
        near = pieces.correlation(spline(np.log(pieces.wavelength) - _ln_doppler(fine)[:, None]))
        curve = np.polyfit(fine - center, near**2, 2)
        value = center - curve[1] / (2.0 * curve[0])
        if not (curve[0] < 0 and abs(value - center) < 0.5 * width):
            return Velocity(cause="radial_velocity: expected a peak of the correlation, got none that is round")
        misfit = max(1.0, (pieces.variation - near.max() ** 2) / pieces.n_free)
        return Velocity(float(value), float(np.hypot(np.sqrt(misfit / -curve[0]), LEAST_ERROR)))

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

    def _spline(self, rung: Rung, number: int, power: float) -> CubicSpline:
        grid = rung.start + rung.step * np.arange(len(rung.mean))
        template = self._own(rung)[number]
        return CubicSpline(grid, _smoothed(template, rung, power))

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

    def __init__(self, wavelength, flux, sigma, good) -> None:
        self.wavelength = wavelength
        position = np.log(np.where(wavelength > 0, wavelength, 1.0))
        number = np.floor((position - position[good][0]) / PIECE).astype(int)
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
            self.flux[part] /= level  # lines of all pieces count alike
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
        Of templates (several, pixels), each with its best depth of lines and with a straight line beside it in each
        piece: (several,). The square of it is what chi^2 is less with the template; negative for lines upside down.
        """
        together, power = np.zeros(len(templates)), np.zeros(len(templates))
        for part in self.slices:
            both, own = self._across(templates[:, part], part)
            together += both
            power += own
        return together / np.sqrt(np.maximum(power, 1e-30))

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
        """Leave out what the template is far from, such as residuals of the sky."""
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


__all__ = ["Velocity", "VelocityMeter"]
