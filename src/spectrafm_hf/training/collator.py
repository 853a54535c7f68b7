# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of a data set -> batches for the model, with augmentation in training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri

from ..data.schema import PIXEL_COLUMNS
from ..models import SpectraFMTokenizer
from ..synthesis.instruments import extinction_curve
from ..synthesis.line_spread import gaussian_noise
from .augmentation import Spectrum, degrade, rebin, shift, smooth


class SpectraFMCollator:
    """
    Stack rows in the project's schema, tokenize them and add labels.

    Parameters
    ----------
    tokenizer : SpectraFMTokenizer
    label_names : sequence of str
        Labels to learn. Their errors are read from the columns `<label>_err`, if present; NaN is unknown.
    scalar_names : sequence of str
        Columns that are inputs of the model as known scalars; NaN is unknown.
    noise : float
        Each spectrum gets additional Gaussian noise of `noise * u` times its errors, u uniform in 0-1 and new at each
        call. The input errors of the model are not changed.
    noise_correlation : float
        Width (one sigma, in pixels) of the Gaussian that smooths this noise, at constant variance; 0: noise that is
        independent from pixel to pixel. Sampled Gaia XP spectra have 343 pixels from about 110 coefficients.
    pixel_dropout : float
        Probability of masking a pixel.
    sky_lines : float
        Each spectrum is masked in runs of 3 to 30 pixels, like sky lines. Their total share of the pixels is uniform
        from 0 to this number (less if they overlap).
    error_dropout : float
        Probability of removing the errors of a spectrum.
    reddening : float
        Each spectrum is reddened by a new A(V) at each call, from a normal distribution of this width, in magnitudes
        (negative: dereddened), with the extinction curve of Gordon et al. 2023 (ApJ 950, 86) for R(V) = 3.1. Labels do
        not depend on foreground dust. For spectra that are not normalised by their continuum.
    tilt : float
        Each spectrum is multiplied by exp of a sum of Legendre polynomials of degree 1 to 3 over its range, with
        coefficients from a normal distribution of this width: errors of flux calibration or continuum.
    wavelength_cut : float
        Probability that a batch keeps only one wavelength window, the same for all its stars, of a tenth to nine tenths
        of the pixels; the other pixels are masked.
    snr : (low, high), optional
        Noise is added to each spectrum for a median S/N that is log-uniform between these limits. Unlike with `noise`,
        the input errors of the model grow with it. See [`augmentation.degrade`].
    radial_velocity : float
        Residual velocity of each star, km/s, from a normal distribution of this width. The wavelength grid does not
        change; see [`augmentation.shift`].
    smoothing : float
        Each spectrum is smoothed with a Gaussian whose width is uniform from 0 to this number of pixels (one sigma).
    resampling : float
        Probability that a batch is averaged over groups of two or three pixels.
    seed : int
        Seed of the augmentation, used together with the column `draw`, the numbers of the draws of the stars (see
        [`spectrafm_hf.training.draws.Draws`]). Without this column, draws are numbered at random by torch's global
        generator.
    batch_size : int
        Stars per batch of all processes together. The first draw of a batch is a multiple of it.

    Notes
    -----
    Random numbers of a star depend on its own draw, and those of a batch on the number of the batch. So two processes
    with half a batch each produce the same stars as one process. There is one exception: if stars have different
    wavelengths, the window of `wavelength_cut` is relative to the first star of each process.
    """

    def __init__(
        self,
        tokenizer: SpectraFMTokenizer,
        label_names: Sequence[str],
        scalar_names: Sequence[str] = (),
        noise: float = 0.0,
        noise_correlation: float = 0.0,
        pixel_dropout: float = 0.0,
        error_dropout: float = 0.0,
        reddening: float = 0.0,
        tilt: float = 0.0,
        wavelength_cut: float = 0.0,
        snr: Sequence[float] = (),
        radial_velocity: float = 0.0,
        smoothing: float = 0.0,
        resampling: float = 0.0,
        sky_lines: float = 0.0,
        seed: int = 0,
        batch_size: int = 1,
    ):
        self.tokenizer = tokenizer
        self.label_names = list(label_names)
        self.scalar_names = list(scalar_names)
        self.noise = noise
        self.noise_correlation = noise_correlation
        self.pixel_dropout = pixel_dropout
        self.error_dropout = error_dropout
        self.reddening = reddening
        self.tilt = tilt
        self.wavelength_cut = wavelength_cut
        if snr and not (len(snr) == 2 and 0 < snr[0] <= snr[1]):
            raise ValueError(f"snr: expected two positive numbers, the least first, got {list(snr)}")
        self.snr = tuple(snr)
        self.radial_velocity = radial_velocity
        self.smoothing = smoothing
        self.resampling = resampling
        self.sky_lines = sky_lines
        self.seed = seed
        self.batch_size = batch_size

    @property
    def degrades(self) -> bool:
        """Whether any augmentation is on."""
        names = ["noise", "pixel_dropout", "error_dropout", "reddening", "tilt", "wavelength_cut", "snr"]
        names += ["radial_velocity", "smoothing", "resampling", "sky_lines"]
        return any(getattr(self, name) for name in names)

    def __call__(self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Tokenize rows, or columns of a data set with format "numpy"."""
        if not isinstance(rows, Mapping):
            rows = {key: [row[key] for row in rows] for key in rows[0]}
        if missing := [key for key in PIXEL_COLUMNS if key not in rows]:
            raise ValueError(
                f"{missing[0]}: expected among the columns of the data set, got {list(rows)} (a Trainer drops columns "
                "unless remove_unused_columns=False)"
            )
        columns = {key: rows[key] for key in PIXEL_COLUMNS}
        n_stars = len(columns["flux"])
        if "draw" in rows:
            draws = np.asarray(rows["draw"])
        elif self.degrades:
            draws = torch.randint(2**62, (n_stars,)).numpy()
        else:  # do not advance the global generator
            draws = np.zeros(n_stars, np.int64)
        self._degrade(columns, draws)
        wanted = [name for name in self.label_names if name in rows]
        known = ("resolving_power", "normalised") if self.tokenizer.basis is not None else ()
        inputs = self.tokenizer(
            **columns,
            **{name: rows[name] for name in known if name in rows},
            scalars={name: np.asarray(rows[name], float) for name in self.scalar_names if name in rows},
            labels={name: np.asarray(rows[name], float) for name in wanted},
            label_errors={name: np.asarray(rows[f"{name}_err"], float) for name in wanted if f"{name}_err" in rows},
        )
        return dict(inputs)

    def _degrade(self, columns: dict[str, Any], draws: np.ndarray) -> None:
        """Augment each star at random, in place."""
        n_stars, stars = len(draws), _Stars(self.seed, draws)
        generator = np.random.default_rng([self.seed, int(draws[0]) // self.batch_size])  # for the batch
        # All are drawn, needed or not: the loop over stars takes most of the time.
        velocity, width, level, snr, extinction, *tilt, share, chance = stars.random((n_stars, 10)).T
        if self.radial_velocity:
            self._change(columns, shift, self.radial_velocity * ndtri(velocity))
        if self.smoothing:
            self._change(columns, smooth, self.smoothing * width)
        if self.resampling and generator.random() < self.resampling:
            self._change(columns, rebin, np.full(n_stars, generator.integers(2, 4)))

        def noise(generator, shape):
            return gaussian_noise(generator, shape, self.noise_correlation)

        if self.noise:
            columns["flux"] = self._by_star(
                lambda flux, error, level, drawn: flux + level * drawn * np.nan_to_num(error),
                columns["flux"],
                columns["flux_error"],
                self.noise * level,
                stars.pixels(noise, columns["flux"]),
            )
        if self.snr:
            low, high = np.log(self.snr)
            self._change(columns, degrade, np.exp(low + (high - low) * snr), stars.pixels(noise, columns["flux"]))
        if self.reddening:
            factors = self._by_star(
                lambda wavelength, extinction: (10 ** (-0.4 * extinction * extinction_curve(wavelength))).astype("f4"),
                columns["wavelength"],
                self.reddening * ndtri(extinction),
            )
            for name in ("flux", "flux_error"):
                columns[name] = self._by_star(np.multiply, columns[name], factors)
        if self.tilt:
            factors = self._by_star(_smooth_factors, columns["wavelength"], self.tilt * ndtri(np.transpose(tilt)))
            for name in ("flux", "flux_error"):
                columns[name] = self._by_star(np.multiply, columns[name], factors)
        if self.wavelength_cut and generator.random() < self.wavelength_cut:
            wavelength = np.sort(columns["wavelength"][0])
            kept = int(np.ceil(generator.uniform(0.1, 0.9) * len(wavelength)))
            first = generator.integers(len(wavelength) - kept + 1)
            window = (wavelength[first], wavelength[first + kept - 1])
            columns["mask"] = self._by_star(
                lambda mask, wavelength, flux: _cut(mask, wavelength, flux, *window),
                *(columns[name] for name in ("mask", "wavelength", "flux")),
            )
        if self.pixel_dropout:
            columns["mask"] = self._by_star(
                lambda mask, number: mask | (number < self.pixel_dropout),
                columns["mask"],
                stars.pixels(lambda generator, shape: generator.random(shape), columns["mask"]),
            )
        if self.sky_lines:
            spectra = zip(columns["mask"], self.sky_lines * share, stars.each(), strict=True)
            runs = [_runs(np.shape(mask), masked, star) for mask, masked, star in spectra]
            columns["mask"] = self._by_star(np.logical_or, columns["mask"], _together(runs))

        if self.error_dropout:
            columns["flux_error"] = self._by_star(
                lambda error, unknown: np.where(unknown, np.float32(np.nan), error),
                columns["flux_error"],
                chance < self.error_dropout,
            )

    @staticmethod
    def _change(columns: dict[str, Any], function: Callable[..., Spectrum], *draws: Any) -> None:
        """Apply a function with drawn values to the spectrum of each star, in place."""
        spectra = zip(*(map(np.asarray, columns[name]) for name in columns), *draws, strict=True)
        changed = zip(*(function(spectrum[:4], *spectrum[4:]) for spectrum in spectra), strict=True)
        for name, values in zip(columns, changed, strict=True):
            columns[name] = _together(list(values))

    @staticmethod
    def _by_star(function, first, *others):
        """Apply a function to (stars, pixels) arrays, or star by star if lengths differ."""
        if isinstance(first, np.ndarray) and first.ndim == 2:
            return function(first, *(other[:, None] if np.ndim(other) == 1 else other for other in others))
        return [function(*map(np.asarray, star)) for star in zip(first, *others, strict=True)]


def _together(values: list[np.ndarray]) -> Any:
    """An array of (stars, pixels), or the list itself if lengths differ."""
    return np.stack(values) if len({len(row) for row in values}) == 1 else values


class _Stars:
    """
    Random numbers of the stars of a batch, from a separate stream for each star and each call: the numbers of a star
    depend neither on the other stars nor on earlier calls.
    """

    def __init__(self, seed: int, draws: np.ndarray):
        self.draws = draws.tolist()
        # Philox is counter-based and can jump to any stream: a generator for each star would take three times as long.
        self.bits = np.random.Philox(key=seed)
        self.start = self.bits.state
        self.generator = np.random.Generator(self.bits)
        self.times = 0

    def each(self) -> Iterator[np.random.Generator]:
        """The generator, set to a new stream for each star."""
        self.times += 1
        for draw in self.draws:
            self.start["state"]["counter"][2:] = self.times, draw
            self.bits.state = self.start
            yield self.generator

    def _draw(self, kind: str, shape: Any, dtype: Any) -> np.ndarray:
        drawn = np.empty(shape, dtype)
        rows = drawn.reshape(len(self.draws), -1)
        for row, generator in zip(rows, self.each(), strict=True):
            getattr(generator, kind)(out=row, dtype=dtype)
        return drawn

    def random(self, shape: Any, dtype: Any = np.float64) -> np.ndarray:
        """Like `Generator.random`; the first axis is the stars."""
        return self._draw("random", shape, dtype)

    def standard_normal(self, shape: Any, dtype: Any = np.float64) -> np.ndarray:
        return self._draw("standard_normal", shape, dtype)

    def pixels(self, draw: Callable[[Any, tuple[int, ...]], np.ndarray], like: Any) -> Any:
        """Output of `draw(generator, shape)` with the shape of `like`: an array, or a list with an array per star."""
        if isinstance(like, np.ndarray) and like.ndim == 2:
            return draw(self, like.shape)
        return [draw(generator, np.shape(row)) for row, generator in zip(like, self.each(), strict=True)]


def _smooth_factors(wavelength: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """(..., pixels), (..., degrees) -> (..., pixels), float32."""
    low, high = wavelength.min(axis=-1, keepdims=True), wavelength.max(axis=-1, keepdims=True)
    x = 2.0 * (wavelength - low) / (high - low) - 1.0
    basis = np.polynomial.legendre.legvander(x, amplitudes.shape[-1])[..., 1:]
    return np.exp(np.einsum("...pd,...d->...p", basis, amplitudes)).astype(np.float32)


RUNS = (3, 31)  # lengths of runs of masked pixels, as of `range`


def _runs(shape: tuple[int, ...], share: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """True in runs at random places that cover a `share` of the pixels, (stars, 1) or one number, without overlaps."""
    n_stars, n_pixels = int(np.prod(shape[:-1])), shape[-1]
    n_runs = generator.poisson(np.reshape(share, -1) * n_pixels / (0.5 * (RUNS[0] + RUNS[1] - 1)), n_stars)
    star = np.repeat(np.arange(n_stars), n_runs)
    length = generator.integers(*RUNS, len(star))
    first = generator.integers(1 - length, n_pixels)
    edges = np.zeros((n_stars, n_pixels + 1), np.int32)
    np.add.at(edges, (star, first.clip(min=0)), 1)
    np.add.at(edges, (star, (first + length).clip(max=n_pixels)), -1)
    return (np.cumsum(edges[:, :-1], axis=1) > 0).reshape(shape)


def _cut(mask: np.ndarray, wavelength: np.ndarray, flux: np.ndarray, low: float, high: float) -> np.ndarray:
    """
    (..., pixels) -> the mask, with all pixels outside `low` to `high`. Stars without signal above the noise in this
    window keep their mask, as they would have no continuum to divide by.
    """
    cut = mask | (wavelength < low) | (wavelength > high)
    left = np.sum(~cut & (flux > 0), axis=-1, keepdims=True) > 0.8 * np.sum(~cut, axis=-1, keepdims=True)
    return np.where(left, cut, mask)
