# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What FITS headers state of a spectrum: medium, frame, resolving power, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from astropy.io import fits

from .base import Row


#: Instruments of ESO whose pipelines give air wavelengths, where a header does not say (their pipeline manuals).
IN_AIR = {"XSHOOTER", "UVES", "FEROS", "HARPS", "GIRAFFE"}
#: SPECSYS of wavelengths as they are observed (FITS 4.0, table 27), and in the frame of the star.
OBSERVED = {"TOPOCENT", "GEOCENTR", "BARYCENT", "HELIOCEN", "LSRK", "LSRD"}


def about(headers: Sequence[fits.Header], wavelength_column: int | None = None) -> Row:
    """
    What is stated, and nothing else.

    Parameters
    ----------
    headers : sequence of Header
        The primary one first; later ones count more.
    wavelength_column : int, optional
        Of a table, from 0.
    """

    def card(*names: str) -> Any:
        return next((header[name] for header in reversed(headers) for name in names if name in header), None)

    row: Row = {}
    axis = str(card("CTYPE1") or "").strip().upper()
    if wavelength_column is None and axis.startswith(("AWAV", "WAVE-", "WAVE")) and axis != "WAVELENGTH":
        row["medium"] = "air" if axis.startswith("AWAV") else "vacuum"
    if wavelength_column is not None:
        ucd = str(card(f"TUCD{wavelength_column + 1}") or "").lower()
        if ucd.startswith("em.wl"):
            row["medium"] = "air" if "obs.atmos" in ucd else "vacuum"
    word = str(card("AIRORVAC", "WAVEMED", "WAVTYPE") or "").strip().lower()
    if word.startswith(("air", "vac")):
        row["medium"] = "air" if word.startswith("air") else "vacuum"
    vacuum = card("VACUUM")
    if isinstance(vacuum, bool | int) and "medium" not in row:
        row["medium"] = "vacuum" if vacuum else "air"
    if "medium" not in row and str(card("INSTRUME") or "").strip().upper() in IN_AIR:
        row["medium"] = "air"
    if "medium" not in row and str(card("TELESCOP") or "").strip().upper() in ("HST", "JWST"):
        row["medium"] = "vacuum"
    if any(
        "wavelengths are in vacuum" in str(line).lower() for header in headers for line in header.get("HISTORY", [])
    ):
        row["medium"] = "vacuum"
    system = str(card("SPECSYS") or "").strip().upper()
    if system == "SOURCE":
        row["frame"] = "rest"
    elif system in OBSERVED or str(card("TELESCOP") or "").strip().upper() in ("HST", "JWST"):
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
