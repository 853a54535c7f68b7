# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""DESI coadds (and files of single exposures), through specutils; the three arms of a star become one spectrum."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .base import NOT_AT_REST, VACUUM, OpenFile, Options, Row, SpectrumFormat, sigma


def read_desi(file: OpenFile, options: Options) -> Iterator[Row]:
    from specutils import SpectrumList

    kind = "DESI coadd" if "INFIL000" in file.header else "DESI spectra"
    arms = SpectrumList.read(file.hdus, format=kind)
    # The arms share one grid of 0.8 Angstrom: where two overlap, the weighted mean of the same pixels is taken.
    every = np.round(np.concatenate([arm.spectral_axis.to_value("Angstrom") for arm in arms]), 3)
    wavelength, pixel = np.unique(every, return_inverse=True)
    for i, target in enumerate(arms[0].meta["fibermap"]["TARGETID"]):
        flux = np.concatenate([np.asarray(arm.flux.value[i], np.float64) for arm in arms])
        weight = np.concatenate([np.asarray(arm.uncertainty.array[i], np.float64) for arm in arms])
        mask = np.concatenate([np.asarray(arm.mask[i], bool) for arm in arms]) | ~np.isfinite(flux) | ~(weight > 0)
        weight, flux = np.where(mask, 0.0, weight), np.where(mask, 0.0, flux)
        total = np.bincount(pixel, weight)
        good = total > 0
        mean = np.divide(np.bincount(pixel, weight * flux), total, out=np.full(total.shape, math.nan), where=good)
        yield {"object_id": str(target), "wavelength": wavelength, "flux": mean, "flux_error": sigma(total)}


FORMATS = (
    SpectrumFormat(
        name="desi",
        survey="desi",
        wavelength_medium=VACUUM,
        rest_frame=NOT_AT_REST,
        flux_unit="1e-17 erg s-1 cm-2 Angstrom-1",
        resolving_power="2,000 to 5,500",
        normalisation="none",
        note="heliocentric; velocities are in the files of Redrock and of the Milky Way Survey, not in these",
        identify=lambda file: {"FIBERMAP", "SCORES", "B_WAVELENGTH"} <= set(file.hdu_names),
        read=read_desi,
    ),
)
