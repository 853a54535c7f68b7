# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Style of all pictures: colours, symbols of labels, axes."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import BinaryIO, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from ..files import complete_file


INK, BLUE, ORANGE, GREY = "#222222", "#1f5fa8", "#d9730d", "#9a9a9a"
#: Orange for small letters, dark enough to read.
RUST = "#9c4a00"
SYMBOLS = {"teff": r"$T_\mathrm{eff}$", "logg": r"$\log g$", "vmicro": r"$v_\mathrm{micro}$", "vsini": r"$v \sin i$"}
WAVELENGTH = r"Wavelength in vacuum [$\mathrm{\AA}$]"


def symbol(label: str) -> str:
    """The symbol of a label: `fe_h` is [Fe/H]."""
    if label in SYMBOLS:
        return SYMBOLS[label]
    numerator, _, denominator = label.partition("_")
    if denominator not in ("fe", "h", "m"):
        return label
    above = r"$\alpha$" if numerator == "alpha" else numerator.capitalize()
    return f"[{above}/{denominator.capitalize()}]"


def axis_label(label: str, units: Mapping[str, str], prefix: str = "") -> str:
    return f"{prefix}{symbol(label)}" + (f" [{units[label]}]" if units.get(label) else "")


def style_axes(axes: Axes) -> None:
    axes.tick_params(direction="in", top=True, right=True, colors=INK)
    axes.minorticks_on()
    axes.tick_params(which="minor", direction="in", top=True, right=True)


def legend_below(figure: Figure, axes: Axes, *, ncols: int, fontsize: float) -> Legend:
    """One legend for the whole figure, below it."""
    handles = axes.get_legend_handles_labels()
    return figure.legend(*handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize=fontsize)


def save_figure(figure: Figure, path: str | os.PathLike[str] | BinaryIO, dpi: int = 150, colours: int = 128) -> None:
    """
    Write a picture atomically, as a PNG file with a palette: a third of the size of one without.

    Parameters
    ----------
    figure : Figure
    path : path or binary file
    dpi : int
    colours : int
        At most 256. Line plots need no more than 64.
    """
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(drawn, dpi=dpi, format="png")
    if hasattr(path, "write"):
        save_with_palette(drawn, cast(BinaryIO, path), colours)
        return
    with complete_file(path) as temporary:
        save_with_palette(drawn, temporary, colours)


def save_with_palette(
    source: str | os.PathLike[str] | BinaryIO, target: str | os.PathLike[str] | BinaryIO, colours: int = 64
) -> None:
    """Write a picture again as a PNG file with at most `colours` colours."""
    with Image.open(source) as image:
        small = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    small.save(target, format="png", optimize=True)
