"""Stellar labels of synthetic stars: their names, their ranges and the distribution they are drawn from.

Training spectra have to cover what is observed, and rare stars more often than they are observed. So the labels are
drawn from a recipe that follows the stars of APOGEE DR17 in the Kiel diagram and in the abundance planes, flattened in
density. It has four steps:

1. A star is a giant (61 %) or a dwarf, in which turn-off stars and subgiants are counted.
2. Giants: log g from a table of quantiles, Teff around the giant branch of that log g and [Fe/H] (220 K).
   Dwarfs: Teff from a table of quantiles, log g around the main sequence (0.3 dex). [Fe/H] of each from a table.
3. [alpha/Fe] from a high (0.22) or a low (0.02) sequence; the high one holds 65 % of the metal-poor stars and none of
   the metal-rich ones. Every element follows it with a slope of its own, measured on APOGEE, and scatters around that.
   [N/Fe] of giants is raised by mixing.
4. vmicro scatters by 18 % around its usual relation with Teff and log g.

Elements scatter independently and more than in real stars, so that what is learned of an element is its own lines.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..models.modeling_emulator import default_vmicro


#: Range of every label drawn, in the units of `spectrafm_hf.data.schema.LABEL_UNITS`.
LABEL_RANGES: dict[str, tuple[float, float]] = {
    "teff": (3125.0, 6760.0),
    "logg": (-0.45, 5.0),
    "fe_h": (-2.5, 0.6),
    "c_fe": (-0.52, 0.46),
    "n_fe": (-0.41, 0.81),
    "o_fe": (-0.5, 0.63),
    "mg_fe": (-0.5, 0.61),
    "si_fe": (-0.39, 0.41),
    "al_fe": (-0.51, 0.52),
    "ca_fe": (-0.28, 0.39),
    "ti_fe": (-0.37, 0.48),
    "mn_fe": (-0.49, 0.3),
    "ni_fe": (-0.24, 0.23),
    "vmicro": (0.35, 2.8),
}

#: Labels of a synthetic star, in the order in which this project writes them.
LABEL_NAMES = tuple(LABEL_RANGES)

_LEVELS = (0.0, 0.01, 0.05, 0.16, 0.33, 0.5, 0.67, 0.84, 0.95, 0.99, 1.0)
_GIANT_LOGG = (-0.45, 0.08, 0.35, 0.83, 1.30, 1.86, 2.43, 2.86, 3.34, 3.56, 3.60)
_GIANT_FE_H = (-2.5, -2.03, -1.57, -1.01, -0.58, -0.35, -0.15, 0.07, 0.28, 0.46, 0.6)
_DWARF_TEFF = (3125, 3450, 3800, 4490, 5250, 5550, 5810, 6230, 6460, 6610, 6760)
_DWARF_FE_H = (-1.2, -0.81, -0.65, -0.44, -0.25, -0.11, 0.0, 0.17, 0.33, 0.46, 0.6)
# [X/Fe]: offset, slope with [Fe/H], slope with [alpha/Fe], scatter.
_ELEMENTS = {
    "c_fe": (-0.036, 0.0, 0.38, 0.155),
    "n_fe": (-0.006, -0.03, 0.14, 0.185),
    "o_fe": (0.034, -0.04, 1.09, 0.115),
    "mg_fe": (-0.004, 0.0, 1.31, 0.06),
    "si_fe": (-0.005, 0.01, 0.92, 0.07),
    "al_fe": (0.003, 0.01, 0.72, 0.14),
    "ca_fe": (-0.008, 0.02, 0.81, 0.075),
    "ti_fe": (-0.017, 0.02, 0.88, 0.105),
    "mn_fe": (0.013, 0.14, -0.35, 0.10),
    "ni_fe": (0.018, -0.01, 0.0, 0.07),
}
_GIANT_N_FE = 0.185


def draw_labels(
    n: int, generator: np.random.Generator, ranges: Mapping[str, tuple[float, float]] = LABEL_RANGES
) -> dict[str, NDArray[np.float64]]:
    """Draw the labels of `n` stars.

    Parameters
    ----------
    n : int
        Number of stars.
    generator : numpy.random.Generator
        Source of randomness; the same state gives the same stars.
    ranges : mapping from label to (lowest, highest), optional
        Stars outside any of these are drawn again, never moved to the edge. Give the range of an emulator to draw stars
        that it covers; labels left out are not limited.

    Returns
    -------
    dict of array, shape (n,)
        Every label of `LABEL_NAMES`, in that order.

    Raises
    ------
    ValueError
        If `n` is negative, a range is of an unknown label, or next to no star lies within the ranges.
    """
    if n < 0:
        raise ValueError(f"n: expected a number of stars of at least 0, got {n}")
    if unknown := [name for name in ranges if name not in LABEL_RANGES]:
        raise ValueError(f"ranges: expected some of the labels {list(LABEL_NAMES)}, got {unknown[0]!r}")
    kept = {name: np.empty(0) for name in LABEL_NAMES}
    drawn = 0
    while (missing := n - len(kept["teff"])) > 0:
        if drawn > 1000 * (n + 100):
            raise ValueError(f"ranges: expected some that hold stars, got {dict(ranges)}")
        stars = _draw(2 * missing + 100, generator)
        drawn += len(stars["teff"])
        inside = np.all([(stars[name] >= low) & (stars[name] <= high) for name, (low, high) in ranges.items()], axis=0)
        kept = {name: np.concatenate([kept[name], stars[name][inside]])[:n] for name in LABEL_NAMES}
    return kept


def _draw(n: int, generator: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    giant = generator.random(n) < 0.61
    level, position = generator.random((2, n))
    fe_h = np.where(giant, np.interp(level, _LEVELS, _GIANT_FE_H), np.interp(level, _LEVELS, _DWARF_FE_H))
    logg = np.interp(position, _LEVELS, _GIANT_LOGG)
    teff = np.interp(position, _LEVELS, _DWARF_TEFF)
    branch = 3069 + 825 * logg - 74 * logg**2 + (117 * logg - 495) * fe_h
    main_sequence = np.interp(teff, (3125, 4250, 5500, 6760), (4.75, 4.52, 4.2, 4.05))
    teff, logg = (
        np.where(giant, branch + 220 * generator.standard_normal(n), teff),
        np.where(giant, logg, main_sequence + 0.3 * generator.standard_normal(n)),
    )
    high = generator.random(n) < 0.65 / (1 + np.exp((fe_h + 0.35) / 0.15))
    alpha = np.where(high, 0.22, 0.02) + 0.085 * generator.standard_normal(n)
    labels = {"teff": teff, "logg": logg, "fe_h": fe_h}
    for name, (offset, slope, alpha_slope, scatter) in _ELEMENTS.items():
        labels[name] = offset + slope * fe_h + alpha_slope * alpha + scatter * generator.standard_normal(n)
    labels["n_fe"] += _GIANT_N_FE * giant
    labels["vmicro"] = default_vmicro(teff, logg) * np.exp(0.18 * generator.standard_normal(n))
    return labels
