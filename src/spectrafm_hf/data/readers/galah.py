# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""GALAH: one file for each of the four cameras of HERMES, through specutils; in air, as the arc lines of IRAF are.

specutils takes the relative errors of these files (docs.datacentral.org.au/galah/dr3/galah-dr3-spectra) for absolute
ones, and hands out the spectra before and after the sky was taken off side by side; only the last is of use.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .base import AIR, NOT_AT_REST, OpenFile, Options, Row, SpectrumFormat


def read_galah(file: OpenFile, options: Options) -> Iterator[Row]:
    from specutils import SpectrumList

    spectra = SpectrumList.read(file.hdus, format="GALAH")
    # The normalised spectrum is the one without a unit; where it is missing, the first had the sky taken off.
    spectrum = next((spectrum for spectrum in spectra if spectrum.flux.unit == ""), spectra[0])
    flux = np.asarray(spectrum.flux.value, np.float64)
    yield {
        "object_id": file.stem[:15],
        "wavelength": spectrum.spectral_axis.to_value("Angstrom"),
        "flux": flux,
        "flux_error": np.asarray(file.hdus[1].data, np.float64) * flux,
    }


FORMATS = (
    SpectrumFormat(
        name="galah",
        survey="galah",
        wavelength_medium=AIR,
        rest_frame=NOT_AT_REST,
        flux_unit="1",
        resolving_power="28,000",
        normalisation="the continuum of the pipeline (counts where there is none)",
        note="one camera a file; the velocity is in the catalogue",
        identify=lambda file: "GALAH" in str(file.header.get("ORIGIN", "")),
        read=read_galah,
    ),
)
