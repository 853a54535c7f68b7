# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""APOGEE's table allStar: its labels, and the cuts of the paper."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from numpy.typing import NDArray

from ..files import one_line
from .schema import with_errors


#: Labels of the paper.
PAPER_LABELS = ("teff", "logg", "o_fe", "mg_fe", "fe_h")
#: Bits of an abundance's own flag (`FE_H_FLAG`, bits of PARAMFLAG) for bad values: GRIDEDGE_BAD, CALRANGE_BAD,
#: OTHER_BAD, FERRE_FAIL, PARAM_MISMATCH_BAD, TEFF_CUT. https://www.sdss4.org/dr17/irspec/apogee-bitmasks
BAD_LABEL_BITS = (0, 1, 2, 3, 4, 6)
#: The same bits of ASPCAPFLAG for parameters.
BAD_PARAMETER_BITS = {"teff": 16, "logg": 17, "vmicro": 18, "m_h": 19, "alpha_m": 20}


#: Columns that the cuts and the archive's file names need, and such as help to join: taken where they are.
ALLSTAR_COLUMNS = ("apogee_id", "telescope", "field", "file", "snr", "starflag", "aspcapflag", "vscatter")


ALLSTAR_EXTRAS = ("gaiaedr3_source_id", "vhelio_avg", "j", "h", "k", "ak_targ")


CHUNK_ROWS = 20_000


def _is_allstar(path: Path) -> bool:
    with fits.open(path) as hdus:
        return len(hdus) > 1 and {"APOGEE_ID", "ASPCAPFLAG"} <= set(getattr(hdus[1], "columns", fits.ColDefs([])).names)


def read_allstar(
    path: str | os.PathLike[str],
    labels: Sequence[str] = PAPER_LABELS,
    *,
    bad_label_bits: Sequence[int] = BAD_LABEL_BITS,
) -> pa.Table:
    """Read the columns that matter of APOGEE's allStar, a few rows of its 4 GB at a time.

    Parameters
    ----------
    path : path
        `allStar-dr17-synspec_rev1.fits` or `allStarLite-dr17-synspec_rev1.fits`, or one like them.
    labels : sequence of str
        Its columns in lower case.
    bad_label_bits : sequence of int
        Bits of a label's flag at which its value and error become NaN; none to take all values unchanged. A
        parameter (`BAD_PARAMETER_BITS`) has one such bit in ASPCAPFLAG.

    Returns
    -------
    pyarrow.Table
        One row an entry, `ALLSTAR_COLUMNS`, those of `ALLSTAR_EXTRAS` that are there, and `<label>`, `<label>_err`
        (float32, NaN where unknown, flagged or -9999).

    Raises
    ------
    ValueError
        If the file cannot be read, ends too early, or lacks a column.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "File may have been truncated", AstropyUserWarning)
            with fits.open(path, memmap=not path.name.endswith(".gz")) as hdus:
                if len(hdus) < 2 or not isinstance(hdus[1], fits.BinTableHDU):
                    raise ValueError("expected a table in its first extension")
                table = hdus[1]
                source = {name.lower(): name for name in table.columns.names}
                pairs = with_errors(labels)
                if missing := [name for name in (*ALLSTAR_COLUMNS, *pairs) if name not in source]:
                    raise ValueError(f"expected the columns {', '.join(missing).upper()}")
                names = [*ALLSTAR_COLUMNS, *(name for name in ALLSTAR_EXTRAS if name in source)]
                starts = range(0, table.header["NAXIS2"], CHUNK_ROWS) or [0]
                # Rows before columns: a column as a whole would be converted, and kept.
                chunks = [
                    _allstar_chunk(table.data[start : start + CHUNK_ROWS], source, names, labels, bad_label_bits)
                    for start in starts
                ]
    except (OSError, ValueError, TypeError, AstropyUserWarning, fits.VerifyError) as error:
        raise ValueError(f"{path}: expected an allStar table, got: {one_line(error)}") from error
    return pa.concat_tables(chunks)


def _allstar_chunk(
    rows: fits.FITS_rec, source: Mapping[str, str], names: Sequence[str], labels: Sequence[str], bits: Sequence[int]
) -> pa.Table:
    columns = {name: arrow_column(np.array(rows[source[name]])) for name in names}
    mask = sum(1 << bit for bit in bits)
    for label in labels:
        pair = [np.array(rows[source[name]], np.float32) for name in (label, f"{label}_err")]
        bad = ~np.isfinite(pair[0]) | (pair[0] < -9990)
        if f"{label}_flag" in source:
            bad |= (np.array(rows[source[f"{label}_flag"]], np.int64) & mask) != 0
        elif label in BAD_PARAMETER_BITS and bits:
            bad |= has_bit(np.array(rows[source["aspcapflag"]]), BAD_PARAMETER_BITS[label])
        pair[1][pair[1] < 0] = np.nan
        for name, values in zip((label, f"{label}_err"), pair, strict=True):
            values[bad] = np.nan
            columns[name] = pa.array(values)
    return pa.table(columns)


def arrow_column(column: Any) -> pa.Array:
    """A column of astropy's, of any byte order, as one of Arrow's; masked values become null."""
    missing = np.ma.getmaskarray(column) if np.ma.isMaskedArray(column) else None
    values = np.asarray(column)
    if values.dtype.kind in "SUO":
        texts = [as_text(value) for value in values.tolist()]
        return pa.array(texts, pa.string(), mask=missing)
    return pa.array(np.ascontiguousarray(values, values.dtype.newbyteorder("=")), mask=missing)


def as_text(source: Any) -> str:
    return (source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source)).strip()


def has_bit(flags: NDArray[Any], bit: int) -> NDArray[np.bool_]:
    return (flags.astype(np.int64) >> bit) & 1 == 1
