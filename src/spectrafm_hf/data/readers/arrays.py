# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""NumPy and HDF5 files. Nothing is unpickled: files with Python objects are refused."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...models.gate_spectrafm import MAX_WAVELENGTH, MIN_WAVELENGTH
from .base import AS_STATED, OpenFile, Options, Row, SpectrumFormat
from .columns import find_columns
from .tables import OF_STARS, are_no_errors, moving, spectrum_of


def _is_npz(file: OpenFile) -> bool:
    try:
        with zipfile.ZipFile(file.path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _check_sizes(file: OpenFile) -> None:
    """Raise for arrays whose stated size exceeds that of the archive, before memory is allocated."""
    with zipfile.ZipFile(file.path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
                shape, _, kind = read(stream)
                needed = math.prod(shape) * kind.itemsize
                there = member.file_size - stream.tell()
            if needed > there and not kind.hasobject:
                raise ValueError(f"{member.filename} with {there:,} bytes instead of {needed:,}")


def read_arrays(file: OpenFile, options: Options) -> Iterator[Row]:
    if file.kind == "npz" and not _is_npz(file):
        raise ValueError(
            f"{file.path}: expected NumPy arrays, got another zip archive (such as an Excel workbook) or part of one; "
            "save the table as CSV"
        )
    try:
        # A single array is memory-mapped.
        content: Any = np.load(file.path, mmap_mode="r", allow_pickle=False)
        arrays = {"flux": content}
        if file.kind == "npz":
            _check_sizes(file)
            with content:
                arrays = {name: content[name] for name in content.files}
    except (ValueError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{file.path}: expected arrays of numbers, which need no unpickling, got {error}") from error
    if file.kind == "npy":
        if content.dtype.names is not None:
            arrays = {name: content[name] for name in content.dtype.names}
        elif options.grid is None and (parts := _rows_of_numbers(file, content, options)) is not None:
            arrays = parts
    yield from _stars(file, arrays, {}, options)


def read_hdf5(file: OpenFile, options: Options) -> Iterator[Row]:
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            f"{file.path}: expected the package h5py to read HDF5, which is not installed: pip install h5py"
        ) from error
    with h5py.File(file.path, "r") as content:
        groups: dict[str, dict[str, Any]] = {}

        def visit(name: str, each: Any) -> None:
            if isinstance(each, h5py.Dataset) and each.dtype.kind in "fiubSO" and each.ndim in (1, 2):
                group, _, last = name.rpartition("/")
                groups.setdefault(group, {})[last] = each

        content.visititems(visit)
        used = {
            group: sets
            for group, sets in groups.items()
            if {"flux"}
            <= find_columns(file.path, sets, options.columns if group == "" else None, demanded=False).keys()
        }
        if not used:
            names = [name for sets in groups.values() for name in sets]
            find_columns(file.path, names, options.columns)
        for group, sets in used.items():
            arrays = {name: _values(each) for name, each in sets.items()}
            written = {name: each.attrs.get("unit", each.attrs.get("units")) for name, each in sets.items()}
            for row in _stars(file, arrays, written, options):
                yield row if len(used) == 1 else {**row, "object_id": group}


def _values(each: Any) -> np.ndarray:
    array = each[()]
    return (
        np.array([text.decode() if isinstance(text, bytes) else str(text) for text in array])
        if array.dtype == object
        else array
    )


def _rows_of_numbers(file: OpenFile, array: np.ndarray, options: Options) -> dict[str, np.ndarray] | None:
    """Two or three rows or columns: wavelengths (monotonic, and of their size), flux, and perhaps errors."""
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        return None
    for part in (array, array.T):
        first = part[0] * options.angstrom
        likely = part.shape[0] in (2, 3) and part.shape[1] > 3 and abs(np.sign(np.diff(first)).sum()) == first.size - 1
        if likely and first.min() >= MIN_WAVELENGTH and first.max() <= MAX_WAVELENGTH:
            if len(part) == 3 and are_no_errors(part[1], part[2]):
                raise ValueError(
                    f"{file.path}: expected errors after wavelength and flux, got numbers as large as the flux; save "
                    "the arrays with names by numpy.savez"
                )
            return dict(zip(("wavelength", "flux", "flux_error"), part, strict=False))
    return None


def _stars(file: OpenFile, arrays: dict[str, Any], written: dict[str, Any], options: Options) -> Iterator[Row]:
    roles = find_columns(file.path, arrays, options.columns, demanded=False)
    if options.grid is not None and not {"wavelength", "log_wavelength"} & roles.keys():
        arrays["wavelength"] = options.grid
        roles["wavelength"] = "wavelength"
    elif file.kind == "npy" and "wavelength" not in roles:
        raise ValueError(
            f"grid: expected the wavelengths of the pixels of {file.path}, got none; give them with grid=WAVELENGTHS"
        )
    if "flux" not in roles or not {"wavelength", "log_wavelength"} & roles.keys():
        roles = find_columns(file.path, arrays, options.columns)
    parts = {role: np.asarray(arrays[name]) if role != "flux" else arrays[name] for role, name in roles.items()}
    flux = np.atleast_2d(parts["flux"])
    wavelength = parts["wavelength" if "wavelength" in parts else "log_wavelength"]
    if wavelength.ndim == 1 and flux.shape[0] == wavelength.size != flux.shape[1]:  # (pixels, stars)
        parts = {role: values.T if np.ndim(values) == 2 else values for role, values in parts.items()}
        flux = flux.T
    for role in OF_STARS:
        if role in parts and parts[role].shape not in (flux.shape, flux.shape[-1:]) and parts[role].size == len(flux):
            del parts[role]  # one number for each star, not for each pixel
    names = [role for role in parts if role not in ("flux", "object_id", "radial_velocity", "redshift")]
    for role in names:
        if parts[role].shape not in (flux.shape, flux.shape[-1:]):
            raise ValueError(
                f"{role}: expected the shape of flux, {flux.shape}, in {file.path}, got {parts[role].shape}"
            )
    ids = np.atleast_1d(parts.get("object_id", []))
    if ids.size not in (0, len(flux)):
        raise ValueError(f"object_id: expected {len(flux)} in {file.path}, got {ids.size}")
    stated = {role: written.get(name) for role, name in roles.items()}
    for i in range(len(flux)):
        pixels = {role: parts[role] if parts[role].ndim == 1 else parts[role][i] for role in names}
        row = spectrum_of({**pixels, "flux": flux[i]}, roles, stated, options)
        there = [role for role in ("radial_velocity", "redshift") if np.size(parts.get(role, ())) in (1, len(flux))]
        row |= moving(
            {role: np.ravel(parts[role])[i if np.size(parts[role]) > 1 else 0] for role in there}, roles, stated
        )
        object_id = str(ids[i]) if ids.size else file.stem if len(flux) == 1 else f"{file.stem}:{i}"
        yield {"object_id": object_id, **row}


_OWN = {
    "survey": "",
    "wavelength_medium": AS_STATED,
    "rest_frame": AS_STATED,
    "flux_unit": AS_STATED,
    "resolving_power": AS_STATED,
    "normalisation": AS_STATED,
}
FORMATS = (
    SpectrumFormat(
        name="numpy",
        **_OWN,
        note=".npz with wavelength, flux and optionally flux_error, mask, object_id; .npy with rows or columns of "
        "wavelength, flux, error, or with fluxes and a separate grid",
        identify=lambda file: file.kind in ("npy", "npz"),
        read=read_arrays,
    ),
    SpectrumFormat(
        name="hdf5",
        **_OWN,
        note="data sets wavelength and flux, in one group or in one group for each star; needs h5py",
        identify=lambda file: file.kind == "hdf5",
        read=read_hdf5,
    ),
)
