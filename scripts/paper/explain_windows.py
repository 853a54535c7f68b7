#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Check that abundances are measured from the lines of their elements, using the windows of a survey.

    python scripts/paper/explain_windows.py --windows apogee_windows_dr17.npz --picture windows.png

The file of windows holds an array of weights for each element (`Mg`, `Al`, ...) on the 7,514 pixels of APOGEE. The
stars are synthetic. For the label of each element, the response is the mean over the stars of its derivative with
respect to the flux of each pixel (`spectrafm_hf.inference.explain`). Printed are, for each element,

- `share`: of the squared response, summed with the weights of the windows over the highest weight;
- `chance`: the mean of the same for the windows shifted along the pixels, around the ends, by each number of pixels
  that is at least `--least`; `ratio`: share / chance;
- `best`: the ratio of the best possible estimate, with errors at the Cramer-Rao bound: windows contain lines of other
  elements too, and an element that cannot be separated from them has to be measured elsewhere;
- `p`: fraction of these shifts with as large a share, counting no shift as one of them;
- `pixels`: the share of the pixels that has a weight.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from spectrafm_cli.arguments import Parser
from spectrafm_hf.checkpoints import BASE_CHECKPOINT, load_checkpoint
from spectrafm_hf.data.readers import batched
from spectrafm_hf.inference.explain import Explainer, Explanation
from spectrafm_hf.show.style import BLUE, INK, ORANGE, save_figure, symbol
from spectrafm_hf.synthesis.bounds import cramer_rao, observe
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import SyntheticStars, load_emulator


Array = NDArray[np.float64]
BATCH = 32
#: Angstrom around the middle of the strongest window.
CLOSE_UP = 30.0


@dataclass(frozen=True)
class InWindows:
    """Share of a response in the windows of an element: see the top of this file."""

    share: float
    chance: float
    p_value: float
    pixels: float


def in_windows(gradient: Array, weights: Array, least: int) -> InWindows:
    """
    Parameters
    ----------
    gradient, weights : array of shape (pixels,)
    least : int
        Pixels that windows are shifted by at least.
    """
    squared = gradient**2 / np.sum(gradient**2)
    # The share for every shift around the ends at once.
    spectrum = np.fft.rfft(squared) * np.conj(np.fft.rfft(weights / weights.max()))
    shares = np.fft.irfft(spectrum, len(squared))
    shifted = shares[least : len(shares) + 1 - least]
    p_value = (1 + np.count_nonzero(shifted >= shares[0])) / (1 + len(shifted))
    return InWindows(float(shares[0]), float(shifted.mean()), float(p_value), float(np.mean(weights > 0)))


def explained(name: str, labels: list[str], n_stars: int, seed: int) -> Explanation:
    """The responses of a checkpoint in synthetic stars of APOGEE."""
    explainer = Explainer(*load_checkpoint(name), labels)
    for batch in batched(islice(SyntheticStars("apogee", seed=seed), n_stars), BATCH):
        if bad := explainer.add(batch):
            print(f"left out: {len(bad)} stars, the first as {next(iter(bad.values()))}", file=sys.stderr)
    return explainer.explanations()["all"]


def best_gradients(n_stars: int, seed: int) -> dict[str, Array]:
    """
    Weight of each pixel, shape (pixels,), in the estimate of each label of the emulator that has the least errors.

    Means over the stars of `explained`. With Fisher matrix F, derivatives J and inverse variances W it is F^-1 J W.
    """
    stars = list(islice(SyntheticStars("apogee", seed=seed), n_stars))
    instrument = Instrument.load("apogee")
    emulator = load_emulator(instrument.emulator)
    labels = np.array([[star[name] for name in emulator.config.label_names] for star in stars], np.float64)
    observed = observe(instrument, emulator, labels, np.random.default_rng(seed))
    assert observed.jacobian is not None
    errors, masks = (np.stack([star[name] for star in stars]) for name in ("flux_error", "mask"))
    ivar = np.where(masks, 0.0, 1.0 / np.where(masks, 1.0, errors) ** 2)
    covariance = cramer_rao(observed.jacobian, ivar, observed.prior)
    means = np.mean(covariance @ (observed.jacobian * ivar[:, None]), axis=0)
    return dict(zip(observed.names, means, strict=True))


def plot_windows(path: Path, found: Explanation, windows: dict[str, Array], results: dict[str, InWindows]) -> None:
    """A row for each element: its response over its windows, of the whole spectrum and around the strongest window."""
    figure = Figure(figsize=(13.33, 7.5), layout=ConstrainedLayoutEngine(h_pad=0.02, hspace=0.0))
    axes = figure.subplots(len(windows), 2, squeeze=False, width_ratios=[3, 1])
    wavelength = found.wavelength
    for (label, weights), (whole, close) in zip(windows.items(), axes, strict=True):
        response = np.abs(found.gradient[found.labels.index(label)])
        best = wavelength[np.argmax(weights)]
        gaps = np.flatnonzero(np.diff(wavelength) > 2.5 * found.step) + 1
        x, above, below = (
            np.insert(curve, gaps, np.nan)
            for curve in (wavelength, response / response.max(), -weights / weights.max())
        )
        for panel in (whole, close):
            panel.fill_between(x, above, color=ORANGE, lw=0.6, step="mid")
            panel.fill_between(x, below, color=BLUE, lw=0.6, step="mid")
            panel.axhline(0, color=INK, lw=0.6)
            panel.set(ylim=(-1.1, 1.1), yticks=[])
            panel.tick_params(direction="in", top=True, colors=INK)
        whole.set_xlim(wavelength[0], wavelength[-1])
        close.set_xlim(best - CLOSE_UP / 2, best + CLOSE_UP / 2)
        close.locator_params(axis="x", nbins=4)
        ratio = results[label].share / results[label].chance
        text = f"{symbol(label)}\n{ratio:.0f} × chance" if ratio >= 10 else f"{symbol(label)}\n{ratio:.1f} × chance"
        whole.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=11, color=INK)
        if label != list(windows)[-1]:
            whole.tick_params(labelbottom=False)
        close.tick_params(labelsize=8)
    figure.supxlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]", fontsize=13, color=INK)
    figure.suptitle(
        f"Orange: where a label responds to the flux, mean of {found.n_stars} synthetic stars.  "
        "Blue: windows of the element.  Right: the strongest window",
        x=0.012, ha="left", fontsize=13, color=INK,
    )  # fmt: skip
    save_figure(figure, path)


def main() -> int:
    parser = Parser(description="Where the labels of a checkpoint respond, and the windows of the elements.")
    parser.add_argument("--windows", type=Path, required=True, metavar="FILE", help=".npz, an array for each element")
    parser.add_argument("--model", default=BASE_CHECKPOINT, metavar="NAME_OR_PATH")
    parser.add_argument("--stars", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--seed", type=int, default=78, help="of the stars (default: 78)")
    parser.add_argument("--least", type=int, default=50, metavar="N", help="pixels of a shift (default: 50)")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return 0


def run(arguments: argparse.Namespace) -> None:
    with np.load(arguments.windows, allow_pickle=False) as file:
        weights = {f"{element.lower()}_{'h' if element == 'Fe' else 'fe'}": file[element] for element in file.files}
    _, tokenizer = load_checkpoint(arguments.model)
    windows: dict[str, Any] = {name: w.astype(float) for name, w in weights.items() if name in tokenizer.label_names}
    if not windows:
        raise ValueError(f"windows: expected elements out of {tokenizer.label_names}, got {sorted(weights)}")
    found = explained(arguments.model, list(windows), arguments.stars, arguments.seed)
    n_pixels = len(found.wavelength)
    if wrong := [name for name, values in windows.items() if values.shape != (n_pixels,)]:
        raise ValueError(f"windows: expected {n_pixels} weights, got {windows[wrong[0]].shape} of {wrong[0]}")
    results = {
        name: in_windows(found.gradient[found.labels.index(name)], values, arguments.least)
        for name, values in windows.items()
    }
    results = dict(sorted(results.items(), key=lambda item: -item[1].share / item[1].chance))
    best = best_gradients(arguments.stars, arguments.seed)
    print(f"{arguments.model}, {found.n_stars} synthetic APOGEE stars, seed {arguments.seed}; {arguments.windows.name}")
    print(f"{'label':6} {'share':>6} {'chance':>7} {'ratio':>6} {'best':>6} {'p':>7} {'pixels':>7}")
    for name, one in results.items():
        ratio, at_best = one.share / one.chance, float("nan")
        if name in best:
            bound = in_windows(best[name], windows[name], arguments.least)
            at_best = bound.share / bound.chance
        ratios = f"{one.share:6.3f} {one.chance:7.4f} {ratio:6.1f} {at_best:6.1f}"
        print(f"{name:6} {ratios} {one.p_value:7.4f} {one.pixels:7.1%}")
    if arguments.picture:
        plot_windows(arguments.picture, found, {name: windows[name] for name in results}, results)
        print(f"written: {arguments.picture}")


if __name__ == "__main__":
    sys.exit(main())
