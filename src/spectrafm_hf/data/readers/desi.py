# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""DESI coadds (and files of single exposures); the arms of a star become one spectrum."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .base import NOT_AT_REST, VACUUM, OpenFile, Options, Row, SpectrumFormat, sigma


def _arms(file: OpenFile) -> list[str]:
    """B, R and Z, or BRZ where they are joined."""
    names = file.hdu_names
    arms = [name.removesuffix("_WAVELENGTH") for name in names if name.endswith("_WAVELENGTH")]
    return [arm for arm in arms if {f"{arm}_FLUX", f"{arm}_IVAR"} <= set(names)]


def read_desi(file: OpenFile, options: Options) -> Iterator[Row]:
    table = file.hdus["FIBERMAP"].data
    names = _arms(file)
    # The arms share one grid of 0.8 Angstrom: where two overlap, the weighted mean of the same pixels is taken.
    grids = [np.asarray(file.hdus[f"{name}_WAVELENGTH"].data, np.float64) for name in names]
    wavelength, pixel = np.unique(np.round(np.concatenate(grids), 3), return_inverse=True)

    def of_all_arms(part: str, i: int) -> np.ndarray:
        # One row at a time, because the image may be scaled.
        return np.concatenate([np.asarray(file.hdus[f"{name}_{part}"].data[i], np.float64) for name in names])

    for i, target in enumerate(table["TARGETID"]):
        flux, weight = of_all_arms("FLUX", i), of_all_arms("IVAR", i)
        mask = ~np.isfinite(flux) | ~(weight > 0)
        if f"{names[0]}_MASK" in file.hdu_names:
            mask |= of_all_arms("MASK", i) != 0
        weight, flux = np.where(mask, 0.0, weight), np.where(mask, 0.0, flux)
        total = np.bincount(pixel, weight)
        good = total > 0
        mean = np.divide(np.bincount(pixel, weight * flux), total, out=np.full(total.shape, math.nan), where=good)
        row: Row = {"object_id": str(target), "wavelength": wavelength, "flux": mean, "flux_error": sigma(total)}
        if "OBJTYPE" in table.names and str(table["OBJTYPE"][i]).strip() in ("SKY", "BAD"):
            row["refused"] = f"OBJTYPE: expected a star, got {str(table['OBJTYPE'][i]).strip()}"
        yield row


FORMATS = (
    SpectrumFormat(
        name="desi",
        survey="desi",
        wavelength_medium=VACUUM,
        rest_frame=NOT_AT_REST,
        flux_unit="1e-17 erg s-1 cm-2 Angstrom-1",
        resolving_power="2,000 to 5,500",
        normalisation="none",
        note="heliocentric; velocities are in the files of Redrock and the Milky Way Survey, not in these",
        identify=lambda file: "FIBERMAP" in file.hdu_names and bool(_arms(file)),
        read=read_desi,
    ),
)
