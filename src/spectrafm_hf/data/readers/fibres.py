# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Images with a row for each fibre, and a table of the targets of the fibres.

2dfdr of AAOmega and HERMES (FIBRES), L1 files of WEAVE (FIBTABLE; the flux is counts times SENSFUNC), the frames of
DESI (FIBERMAP), and spPlate of SDSS (PLUGMAP), whose extensions have no names: inverse variance, AND mask, OR mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import OpenFile, Row
from .columns import pixel_names, plain
from .late import fits
from .sdss import BAD_PIXELS


#: Columns with the target of a fibre, and their values for fibres without one.
_KINDS = {"objtype": {"SKY", "BAD", "NA"}, "targuse": {"S"}, "type": {"S", "N", "U", "F"}}
_NAMES = ("cname", *pixel_names("object_id"))


def fibres(file: OpenFile, n_rows: int) -> list[Row] | None:
    """Identifier of each of `n_rows` spectra, and why it is refused, from the table of fibres; None without a table."""
    tables = [hdu for hdu in file.hdus if isinstance(hdu, fits.BinTableHDU) and hdu.header["NAXIS2"] == n_rows]
    for hdu in tables:
        words = {plain(name): name for name in hdu.columns.names if hdu.columns.dtype[name].shape == ()}
        named = next((words[word] for word in _NAMES if word in words), None)
        kind = next((word for word in _KINDS if word in words), None)
        if named is None and kind is None:
            continue
        rows: list[Row] = [{"object_id": f"{file.stem}:{i}"} for i in range(n_rows)]
        for i, row in enumerate(rows):
            if named is not None and (text := str(hdu.data[named][i]).strip()):
                row["object_id"] = text
            found = "" if kind is None else str(hdu.data[words[kind]][i]).strip().upper()
            if kind is not None and found in _KINDS[kind]:
                row["refused"] = f"{words[kind]}: expected a target, got {found}, which means sky or no target"
        return rows
    return None


def beside_fibres(flux: Any, images: Sequence[Any], values: np.ndarray) -> Row:
    """Flux, error and mask of all fibres, from images named after that of the flux, or following it."""
    before = re.sub("(data|flux)$", "", plain(flux.name))
    same = {
        plain(hdu.name).removeprefix(before): hdu for hdu in images if hdu is not flux and hdu.shape == values.shape
    }
    others: Row = {}
    if "COEFF0" in flux.header and len(images) > 2 and images[1].shape == images[2].shape == values.shape:
        others = {"flux_error": np.asarray(images[1].data, np.float64), "error_kind": "ivar"}
        others |= {"mask": np.asarray(images[2].data), "bad_bits": BAD_PIXELS, "medium": "vacuum", "frame": "observed"}
    for name, kind in (("ivar", "ivar"), ("variance", "variance"), ("var", "variance"), ("error", "sigma")):
        if name in same and not others:
            others = {"flux_error": np.asarray(same[name].data, np.float64), "error_kind": kind}
    if "sensfunc" in same:
        factor = np.asarray(same["sensfunc"].data, np.float64)
        values = values * factor
        if "flux_error" in others:
            power = {"ivar": -2, "variance": 2, "sigma": 1}[others["error_kind"]]
            with np.errstate(divide="ignore"):
                others["flux_error"] = others["flux_error"] * factor**power
    return {**others, "flux": values}


def row_of(parts: Row, i: int) -> Row:
    """Flux, error and mask of one fibre."""
    return {name: value[i] if getattr(value, "ndim", 0) == 2 else value for name, value in parts.items()}
