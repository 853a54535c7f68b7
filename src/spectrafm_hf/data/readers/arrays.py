# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""NumPy files. Nothing is ever unpickled: a file that holds Python objects is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .base import AS_GIVEN, OpenFile, Options, Row, SpectrumFormat
from .parquet import demand_columns


def read_arrays(file: OpenFile, options: Options) -> Iterator[Row]:
    try:
        # A single array stays on disk, whatever its size.
        content: Any = np.load(file.path, mmap_mode="r", allow_pickle=False)
        arrays = {"flux": content}
        if file.kind == "npz":
            with content:
                arrays = {name: content[name] for name in content.files}
    except (ValueError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{file.path}: expected arrays of numbers, which need no unpickling, got {error}") from error
    if "wavelength" in arrays:
        arrays["wavelength"] = np.asarray(arrays["wavelength"], np.float64) * options.angstrom
    elif options.grid is not None:
        arrays["wavelength"] = options.grid * options.angstrom
    elif file.kind == "npy":
        raise ValueError(f"grid: expected the wavelengths of the pixels of {file.path}, got none")
    demand_columns(file.path, arrays)
    flux = np.atleast_2d(arrays["flux"])
    names = [name for name in ("wavelength", "flux_error", "mask") if name in arrays]
    for name in names:
        if arrays[name].shape not in (flux.shape, flux.shape[-1:]):
            raise ValueError(
                f"{name}: expected the shape of flux, {flux.shape}, in {file.path}, got {arrays[name].shape}"
            )
    ids = np.atleast_1d(arrays.get("object_id", []))
    if ids.size not in (0, len(flux)):
        raise ValueError(f"object_id: expected {len(flux)} in {file.path}, got {ids.size}")
    for i in range(len(flux)):
        row: Row = {name: arrays[name] if arrays[name].ndim == 1 else arrays[name][i] for name in names}
        object_id = str(ids[i]) if ids.size else file.stem if len(flux) == 1 else f"{file.stem}:{i}"
        yield {"object_id": object_id, **row, "flux": flux[i]}


FORMATS = (
    SpectrumFormat(
        name="numpy",
        survey="",
        wavelength_medium=AS_GIVEN,
        rest_frame=AS_GIVEN,
        flux_unit="as given",
        resolving_power="as given",
        normalisation="as given",
        note=".npz with wavelength, flux and where known flux_error, mask, object_id; or .npy with fluxes and a grid",
        identify=lambda file: file.kind in ("npy", "npz"),
        read=read_arrays,
    ),
)
