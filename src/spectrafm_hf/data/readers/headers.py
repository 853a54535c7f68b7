# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Medium, frame, resolving power and normalisation of a spectrum from its FITS headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .base import Row
from .late import fits


#: Instruments whose pipelines use air wavelengths, if the header does not say (from their manuals). HARPS-N, SOPHIE and
#: CORALIE use the pipeline of HARPS.
IN_AIR = {
    "XSHOOTER",
    "UVES",
    "FEROS",
    "HARPS",
    "GIRAFFE",
    "HARPN",
    "HARPS-N",
    "SOPHIE",
    "CORALIE",
    "ESPADONS",
    "NARVAL",
}
#: SPECSYS begins with one of these for observed wavelengths (FITS 4.0, table 27), and for those in the star's frame.
OBSERVED = ("TOPOC", "GEOC", "BARY", "HELIO", "LSR", "GALACTO", "LOCALGR", "CMBDIP", "OBSERV")
REST = ("SOURCE", "REST")


#: Cards with the medium, air or vacuum.
MEDIUM = ("AIRORVAC", "WAVEMED", "WAVTYPE", "WAVETYPE", "AIRVAC", "VACAIR", "MEDIUM", "WAVSYS")


def medium_in_words(text: str) -> str | None:
    """The medium of wavelengths named in remarks; None if they name none or both, or mention a conversion."""
    if re.search(r"\b(convert|correct|transform)|\bto\s+(air|vac)", text, re.IGNORECASE):
        return None
    found = re.findall(r"\bwavelengths?(?:\s+\w+){0,2}\s+in\s+(?:the\s+)?(air|vac)(?:uum)?\b", text, re.IGNORECASE)
    said = {"air" if word.lower() == "air" else "vacuum" for word in found}
    return said.pop() if len(said) == 1 else None


def about(headers: Sequence[fits.Header], wavelength_column: int | None = None) -> Row:
    """
    Statements of the headers; keys are left out where they state nothing.

    Parameters
    ----------
    headers : sequence of Header
        The primary one first; later ones take precedence.
    wavelength_column : int, optional
        Index of the column in a table, from 0.
    """

    def card(*names: str) -> Any:
        return next((header[name] for header in reversed(headers) for name in names if name in header), None)

    row: Row = {}
    axis = str(card("CTYPE1") or "").strip().upper()
    if wavelength_column is None and axis.startswith(("AWAV", "WAVE-", "WAVE")) and axis != "WAVELENGTH":
        row["medium"] = "air" if axis.startswith("AWAV") else "vacuum"
    if wavelength_column is None and axis.startswith(("FREQ", "WAVN", "ENER")):
        row["medium"] = "vacuum"
    if wavelength_column is not None:
        ucd = str(card(f"TUCD{wavelength_column + 1}") or "").lower()
        if ucd.startswith("em.wl"):
            row["medium"] = "air" if "obs.atmos" in ucd else "vacuum"
    word = str(card(*MEDIUM) or "").strip().lower()
    if word.startswith(("air", "vac")):
        row["medium"] = "air" if word.startswith("air") else "vacuum"
    vacuum = card("VACUUM")
    if isinstance(vacuum, bool | int) and "medium" not in row:
        row["medium"] = "vacuum" if vacuum else "air"
    if "medium" not in row and str(card("INSTRUME") or "").strip().upper() in IN_AIR:
        row["medium"] = "air"
    if "medium" not in row and str(card("TELESCOP") or "").strip().upper() in ("HST", "JWST"):
        row["medium"] = "vacuum"
    if "medium" not in row and card("PYP_SPEC") is not None:  # the default of PypeIt
        row["medium"] = "vacuum"
    remarks = " ".join(
        str(line) for header in headers for name in ("HISTORY", "COMMENT") for line in header.get(name, [])
    )
    if "wavelengths are in vacuum" in remarks.lower():
        row["medium"] = "vacuum"
    if "medium" not in row and (said := medium_in_words(remarks)) is not None:
        row["medium"] = said
    system = str(card("SPECSYS") or "").strip().upper()
    redshift = card("ZSOURCE")
    if isinstance(redshift, int | float) and not isinstance(redshift, bool):
        row["redshift"] = float(redshift)
    if system.startswith(REST):
        row["frame"] = "rest"
    elif system.startswith(OBSERVED) or str(card("TELESCOP") or "").strip().upper() in ("HST", "JWST"):
        row["frame"] = "observed"
    power = card("SPEC_RES", "SPEC_RP", "RP", "RESOLPOW")
    if isinstance(power, int | float) and not isinstance(power, bool) and power > 1:
        row["resolving_power"] = float(power)
    if isinstance(normalised := card("CONTNORM"), bool):
        row["normalised"] = normalised
    kind = card("CLASS")
    if isinstance(kind, str):
        row["object_class"] = kind
    return row
