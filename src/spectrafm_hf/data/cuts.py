# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The choice of stars of the paper, as named steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .allstar import has_bit
from .labels import label_columns


STAR_BAD = 23


class Cut(NamedTuple):
    """A step in the choice of stars: what it keeps, in words and as a function of the table, shape (rows,)."""

    description: str
    keep: Callable[[pa.Table], NDArray[np.bool_]]


def _best_snr(table: pa.Table) -> NDArray[np.bool_]:
    """The first of the best entries of each star."""
    _, star = np.unique(table["apogee_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    snr = np.nan_to_num(table["snr"].to_numpy(), nan=-np.inf)
    order = np.lexsort((np.arange(len(snr)), -snr, star))
    keep = np.zeros(len(table), bool)
    keep[order[np.flatnonzero(np.diff(star[order], prepend=-1))]] = True
    return keep


def _has_label(table: pa.Table) -> NDArray[np.bool_]:
    columns = [np.isfinite(table[name].to_numpy()) for name in label_columns(table)]
    return np.any(columns, axis=0) if columns else np.zeros(len(table), bool)


#: The choice of stars in the paper, in its order: 128,485 stars of DR17 after the first five, 128,428 with labels.
CUTS: dict[str, Cut] = {
    "snr": Cut("SNR > 200", lambda table: table["snr"].to_numpy() > 200),
    "starflag": Cut("STARFLAG == 0", lambda table: table["starflag"].to_numpy() == 0),
    "vscatter": Cut("VSCATTER < 1 km/s", lambda table: table["vscatter"].to_numpy() < 1),
    "star_bad": Cut(
        "bit 23 (STAR_BAD) of ASPCAPFLAG not set", lambda table: ~has_bit(table["aspcapflag"].to_numpy(), STAR_BAD)
    ),
    "best_snr": Cut("the entry of the best SNR of each APOGEE_ID", _best_snr),
    "labels": Cut("at least one label", _has_label),
}


def apply_cuts(table: pa.Table, names: Sequence[str] = tuple(CUTS)) -> tuple[pa.Table, list[tuple[str, int]]]:
    """Choose stars step by step.

    Parameters
    ----------
    table : pyarrow.Table
        As `read_allstar` returns it.
    names : sequence of str
        Steps out of `CUTS`, in the order in which to take them.

    Returns
    -------
    pyarrow.Table
        What is left.
    list of (name, count)
        How many entries are left after each step; the first is `("all", len(table))`.

    Raises
    ------
    ValueError
        For a step that does not exist.
    """
    if unknown := [name for name in names if name not in CUTS]:
        raise ValueError(f"cuts: expected names out of {', '.join(CUTS)}, got {', '.join(unknown)}")
    counts = [("all", len(table))]
    for name in names:
        table = table.filter(pa.array(CUTS[name].keep(table)))
        counts.append((name, len(table)))
    return table, counts
