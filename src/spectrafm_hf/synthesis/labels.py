"""Stellar labels of synthetic stars: their names, their ranges and the distribution they are drawn from.

Training spectra have to cover the observed stars, and rare ones more often than they are observed. So the labels are
drawn from a recipe that follows the stars of APOGEE DR17 in the Kiel diagram and in the abundance planes, flattened in
density. It has four steps:

1. A star is a giant (61 %) or a dwarf, in which turn-off stars and subgiants are counted.
2. Giants: log g from a table of quantiles, Teff around the giant branch of that log g and [Fe/H] (220 K).
   Dwarfs: Teff from a table of quantiles, log g around the main sequence (0.3 dex). [Fe/H] of each from a table.
3. [alpha/Fe] from a high (0.22) or a low (0.02) sequence; the high one holds 65 % of the metal-poor stars and none of
   the metal-rich ones. Every element follows it with a slope of its own, measured on APOGEE, and scatters around that.
   [N/Fe] of giants is raised by mixing.
4. vmicro scatters by 18 % around its usual relation with Teff and log g.

Elements scatter independently and more than in real stars, so that a model learns each element from its own lines.

The optical has another recipe, `draw_optical_labels`: two fifths of the stars as above, and a fifth each of hot, cool
and metal-poor stars; 18 more elements; and more scatter of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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

#: The same of a star in the optical, where more elements have lines.
OPTICAL_LABEL_RANGES: dict[str, tuple[float, float]] = {
    "teff": (3000.0, 8000.0),
    "logg": (-0.5, 5.2),
    "fe_h": (-2.8, 0.6),
    **dict.fromkeys(
        ("c_fe", "n_fe", "o_fe", "mg_fe", "si_fe", "al_fe", "ca_fe", "ti_fe", "mn_fe", "ni_fe"), (-0.9, 0.9)
    ),
    **dict.fromkeys(("na_fe", "k_fe", "s_fe", "sc_fe", "v_fe", "cr_fe", "co_fe", "cu_fe", "zn_fe"), (-0.9, 0.9)),
    **dict.fromkeys(("sr_fe", "y_fe", "zr_fe", "ba_fe", "la_fe", "ce_fe", "nd_fe", "eu_fe"), (-0.9, 0.9)),
    "li_fe": (-2.2, 5.3),
    "vmicro": (0.2, 4.0),
}
OPTICAL_LABEL_NAMES = tuple(OPTICAL_LABEL_RANGES)

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
# The same for the optical.
_OPTICAL_ELEMENTS = {
    **{name: (*_ELEMENTS[name][:3], scatter) for name, scatter in dict(c_fe=0.2, n_fe=0.25, o_fe=0.2).items()},
    **{name: (*_ELEMENTS[name][:3], 0.15) for name in ("mg_fe", "si_fe", "ca_fe", "ti_fe", "ni_fe")},
    **{name: (*_ELEMENTS[name][:3], 0.2) for name in ("al_fe", "mn_fe")},
    "na_fe": (0.0, 0.0, 0.2, 0.2),
    "k_fe": (0.0, 0.0, 0.7, 0.2),
    "s_fe": (0.0, 0.0, 0.9, 0.2),
    "sc_fe": (0.0, 0.0, 0.5, 0.15),
    "v_fe": (0.0, 0.0, 0.4, 0.15),
    "cr_fe": (0.0, 0.0, 0.0, 0.15),
    "co_fe": (0.0, 0.0, 0.4, 0.15),
    "cu_fe": (0.0, 0.15, -0.2, 0.2),
    "zn_fe": (0.0, 0.0, 0.4, 0.15),
    "sr_fe": (0.0, 0.0, 0.0, 0.25),
    "y_fe": (0.0, 0.0, 0.0, 0.2),
    "zr_fe": (0.0, 0.0, 0.2, 0.2),
    "ba_fe": (0.0, 0.0, 0.0, 0.25),
    "la_fe": (0.0, 0.0, 0.0, 0.25),
    "ce_fe": (0.0, 0.0, 0.0, 0.25),
    "nd_fe": (0.0, 0.0, 0.3, 0.25),
    "eu_fe": (0.0, 0.0, 1.0, 0.25),
}
_SOLAR_LITHIUM = 1.05
_LITHIUM = (-0.5, 3.5)  # log10 of the number of atoms, with hydrogen 12
_OPTICAL_KINDS = (0.4, 0.2, 0.2, 0.2)  # usual, hot, cool, metal-poor


def usual_abundances(
    logg: NDArray[np.float64], fe_h: NDArray[np.float64], alpha_m: NDArray[np.float64], names: Sequence[str]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, float], dict[str, float]]:
    """
    [X/Fe] of stars as [`draw_labels`], or for other elements [`draw_optical_labels`], has them.

    Parameters
    ----------
    logg, fe_h, alpha_m : array of shape (stars,)
        `alpha_m` is the mean of O, Mg, Si, Ca and Ti.
    names : sequence of str
        Labels; those that are no abundances are left out.

    Returns
    -------
    usual : dict of str to array of shape (stars,)
    scatter : dict of str to float
    by_alpha : dict of str to float
        Change of each with `alpha_m`.
    """
    offset, by_fe_h, slope, _ = np.mean([_ELEMENTS[f"{name}_fe"] for name in ("o", "mg", "si", "ca", "ti")], axis=0)
    alpha = (alpha_m - offset - by_fe_h * fe_h) / slope
    usual, scatter, by_alpha = {}, {}, {}
    for name in names:
        if (element := _ELEMENTS.get(name) or _OPTICAL_ELEMENTS.get(name)) is None:
            continue
        usual[name] = element[0] + element[1] * fe_h + element[2] * alpha
        if name == "n_fe":
            usual[name] = usual[name] + np.where(logg < 3.5, _GIANT_N_FE, 0.0)
        scatter[name], by_alpha[name] = element[3], element[2] / slope
    return usual, scatter, by_alpha


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
        If `n` is negative, a range is of an unknown label, or almost no star is within the ranges.
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
    labels = {"teff": teff, "logg": logg, "fe_h": fe_h}
    labels |= _draw_elements(fe_h, _ELEMENTS, generator)
    labels["n_fe"] += _GIANT_N_FE * giant
    labels["vmicro"] = default_vmicro(teff, logg) * np.exp(0.18 * generator.standard_normal(n))
    return labels


def _draw_elements(
    fe_h: NDArray[np.float64], elements: Mapping[str, tuple[float, ...]], generator: np.random.Generator
) -> dict[str, NDArray[np.float64]]:
    """[X/Fe] of stars of low and high [alpha/Fe]."""
    n = len(fe_h)
    high = generator.random(n) < 0.65 / (1 + np.exp((fe_h + 0.35) / 0.15))
    alpha = np.where(high, 0.22, 0.02) + 0.085 * generator.standard_normal(n)
    return {
        name: offset + slope * fe_h + alpha_slope * alpha + scatter * generator.standard_normal(n)
        for name, (offset, slope, alpha_slope, scatter) in elements.items()
    }


def draw_optical_labels(
    n: int,
    generator: np.random.Generator,
    accept: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.bool_]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Draw the labels of `n` stars for the optical.

    Usual stars (two fifths) have Teff, log g and [Fe/H] as `draw_labels`. A fifth each is hot (6,500 to 8,000 K; one in
    seven of them on the horizontal branch), cool (3,000 to 4,000 K; half of them giants) and metal-poor ([Fe/H] -2.8 to
    -1; half of them giants). Elements follow [alpha/Fe] as there, with more scatter. Lithium is drawn as an abundance
    with hydrogen 12, evenly between -0.5 and 3.5, as it has little to do with iron.

    Parameters
    ----------
    n : int
        Number of stars.
    generator : numpy.random.Generator
        Source of randomness; the same state gives the same stars.
    accept : function from labels to bool array, optional
        Stars it refuses are drawn again, such as those without a model atmosphere.

    Returns
    -------
    dict of array, shape (n,)
        Every label of `OPTICAL_LABEL_NAMES`, in that order.

    Raises
    ------
    ValueError
        If `n` is negative, or almost no star is accepted.
    """
    if n < 0:
        raise ValueError(f"n: expected a number of stars of at least 0, got {n}")
    kept = {name: np.empty(0) for name in OPTICAL_LABEL_NAMES}
    for _ in range(1000):
        missing = n - len(kept["teff"])
        if not missing:
            return kept
        stars = _draw_optical(2 * missing + 100, generator)
        limits = OPTICAL_LABEL_RANGES.items()
        inside = np.all([(stars[name] >= low) & (stars[name] <= high) for name, (low, high) in limits], axis=0)
        stars = {name: values[inside] for name, values in stars.items()}
        if accept is not None:
            accepted = accept(stars)
            stars = {name: values[accepted] for name, values in stars.items()}
        kept = {name: np.concatenate([kept[name], stars[name]])[:n] for name in OPTICAL_LABEL_NAMES}
    raise ValueError(f"accept: expected some stars to be accepted, got {len(kept['teff'])} of {n}")


def _draw_optical(n: int, generator: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    usual = _draw(n, generator)
    kind = generator.choice(len(_OPTICAL_KINDS), n, p=_OPTICAL_KINDS)
    giant = generator.random(n) < 0.5
    level, position = generator.random((2, n))
    noise = generator.standard_normal(n)

    hot_logg = np.where(generator.random(n) < 1 / 7, 2.3 + position, 3.3 + 1.3 * position)
    cool_teff = 3000 + 1000 * level
    cool_logg = np.where(
        giant, -0.5 + 1.7e-3 * (cool_teff - 3000) + 0.3 * noise, 5.1 - 4.5e-4 * (cool_teff - 3000) + 0.12 * noise
    )
    poor_giant_logg = 0.3 + 3.1 * position
    poor_dwarf_teff = 4500 + 2200 * position
    subgiant = (generator.random(n) < 0.3) & (poor_dwarf_teff > 5300)
    poor_dwarf_logg = np.where(
        subgiant, 3.5 + 0.7 * generator.random(n), 4.7 - 2e-4 * (poor_dwarf_teff - 4500) + 0.2 * noise
    )
    poor_teff = np.where(giant, 3880 + 430 * poor_giant_logg + 150 * noise, poor_dwarf_teff)
    poor_logg = np.where(giant, poor_giant_logg, poor_dwarf_logg)
    labels = {
        "teff": np.choose(kind, [usual["teff"], 6500 + 1500 * level, cool_teff, poor_teff]),
        "logg": np.choose(kind, [usual["logg"], hot_logg, cool_logg, poor_logg]),
        "fe_h": np.choose(
            kind, [usual["fe_h"], -1.2 + 1.8 * generator.random(n), -1.2 + 1.8 * position, -2.8 + 1.8 * level]
        ),
    }
    fe_h = labels["fe_h"]
    labels |= _draw_elements(fe_h, _OPTICAL_ELEMENTS, generator)
    labels["n_fe"] += _GIANT_N_FE * (labels["logg"] < 3.5)
    labels["li_fe"] = generator.uniform(*_LITHIUM, n) - _SOLAR_LITHIUM - fe_h
    labels["vmicro"] = default_vmicro(labels["teff"], labels["logg"]) * np.exp(0.18 * generator.standard_normal(n))
    return labels
