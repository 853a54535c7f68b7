"""The one schema in which this project holds spectra of any survey.

Every reader writes it and everything after the readers (tokenizer, collator, pipelines) relies on it.
One row is one spectrum.

=============== ============= =======================================================================================
column          type          meaning
=============== ============= =======================================================================================
``object_id``   string        the survey's name of the star
``survey``      string        the survey, such as ``gaia-xp``
``wavelength``  list<float32> Angstrom, vacuum, rest frame of the star (or too coarse for that, as stated in the card)
``flux``        list<float32> in the survey's own units or divided by a continuum; the data card says which
``flux_error``  list<float32> one standard deviation, in the units of ``flux``; NaN where the survey gives none
``mask``        list<bool>    **True = do not use this pixel**, as in ``numpy.ma`` and in the tokenizer's ``mask``
``snr``         float32       signal-to-noise ratio of a pixel, as the survey defines it; NaN = unknown
label           float32       one column a label (``LABEL_UNITS``); NaN = unknown
``<label>_err`` float32       one standard deviation of that label, in its units; NaN = unknown
scalar          float32       one column a scalar (``SCALAR_UNITS``); NaN = unknown
=============== ============= =======================================================================================

The four lists of a row are equally long; rows may differ. A reader may add columns of other types (an integer
identifier, say). Labels differ from scalars by their ``_err`` column.

float32 resolves 0.001 Angstrom at 15,000 Angstrom, 0.02 km/s, a hundredth of what any of the surveys calibrates to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from ..models.inputs_spectrafm import HUGE


if TYPE_CHECKING:
    import datasets


_ELEMENTS = (
    *("c", "n", "o", "na", "mg", "al", "si", "s", "k", "ca", "ti", "v", "cr", "mn", "co", "ni", "ce"),
    *("li", "sc", "cu", "zn", "sr", "y", "zr", "ba", "la", "nd", "eu"),
)

#: Unit of every label known by name. Names are the columns of APOGEE's allStar table in lower case, where
#: ``m_h`` is the overall metallicity and ``alpha_m`` the alpha elements relative to it.
LABEL_UNITS: dict[str, str] = {
    "teff": "K",
    "logg": "dex (cm s-2)",
    "m_h": "dex",
    "fe_h": "dex",
    "alpha_m": "dex",
    **{f"{element}_fe": "dex" for element in _ELEMENTS},
    "vmicro": "km s-1",
    "vsini": "km s-1",
}

#: Units of predicted spectra.
OVER_CONTINUUM, SURFACE = "flux / continuum", "erg s-1 cm-2 Angstrom-1"

#: Unit of every scalar known by name.
SCALAR_UNITS: dict[str, str] = {
    "j": "mag (2MASS, Vega)",
    "h": "mag (2MASS, Vega)",
    "k": "mag (2MASS, Vega)",
    "phot_g_mean_mag": "mag (Gaia, Vega)",
    "phot_bp_mean_mag": "mag (Gaia, Vega)",
    "phot_rp_mean_mag": "mag (Gaia, Vega)",
    "ak_targ": "mag",
    "medflux": "W m-2 nm-1",
    "radial_velocity": "km s-1",
    "parallax": "mas",
}

PIXEL_COLUMNS = ("wavelength", "flux", "flux_error", "mask")
_RESERVED = ("object_id", "survey", *PIXEL_COLUMNS, "snr")


def with_errors(names: Iterable[str]) -> list[str]:
    """Names of labels or scalars, each followed by that of its error."""
    return [column for name in names for column in (name, f"{name}_err")]


def spectrum_features(label_names: Sequence[str], scalar_names: Sequence[str] = ()) -> datasets.Features:
    """Features of a data set of spectra, in the order of the table above.

    Parameters
    ----------
    label_names : sequence of str
        Labels; each gets a column and an ``_err`` column. Names outside ``LABEL_UNITS`` are allowed.
    scalar_names : sequence of str
        Further float columns without an error.

    Returns
    -------
    datasets.Features

    Raises
    ------
    ValueError
        If a name is not in lower case, is given twice or is taken by the schema.
    """
    import datasets  # which takes a second, and no reader needs it

    number = datasets.Value("float32")
    columns: dict[str, Any] = {"object_id": datasets.Value("string"), "survey": datasets.Value("string")}
    columns |= {name: datasets.List(number) for name in ("wavelength", "flux", "flux_error")}
    columns |= {"mask": datasets.List(datasets.Value("bool")), "snr": number}
    for name in (*with_errors(label_names), *scalar_names):
        if name != name.lower():
            raise ValueError(f"label_names, scalar_names: expected lower case, got {name!r}")
        if name in columns:
            raise ValueError(f"label_names, scalar_names: expected each once and none of {_RESERVED}, got {name!r}")
        columns[name] = number
    return datasets.Features(columns)


def digits(unit: str) -> int:
    """Decimals worth printing of a label in this unit."""
    return 0 if unit == "K" else 2


def label_names_of(column_names: Iterable[str]) -> list[str]:
    """Names of the labels among some column names: those with an ``_err`` column."""
    names = list(column_names)
    return [name for name in names if f"{name}_err" in names]


def pixel_column(values: ArrayLike, lengths: ArrayLike | None = None) -> pa.ListArray:
    """List column made from one array of pixels, without Python lists.

    Parameters
    ----------
    values : array, shape (rows, pixels), or (all pixels,) if `lengths` is given
        Any byte order; booleans stay booleans, others become float32.
    lengths : array of int, shape (rows,), optional
        Number of pixels of each row, for rows that differ.

    Returns
    -------
    pyarrow.ListArray of `rows` lists
    """
    array = np.asarray(values)
    if lengths is None:
        if array.ndim != 2:
            raise ValueError(f"values: expected shape (rows, pixels) where no lengths are given, got {array.shape}")
        lengths = np.full(array.shape[0], array.shape[1])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    if offsets[-1] != array.size:
        raise ValueError(f"lengths: expected a sum of {array.size}, the number of values, got {offsets[-1]}")
    flat = array.ravel() if array.dtype == bool else np.ascontiguousarray(array.ravel(), dtype=np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def flat_pixels(column: pa.ChunkedArray | pa.Array) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Inverse of `pixel_column`: values end to end, shape (all pixels,), and pixels per row, shape (rows,)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
    return pc.list_flatten(array).to_numpy(zero_copy_only=False), lengths


def validate_table(table: pa.Table) -> None:
    """Check that a table holds to the schema.

    Parameters
    ----------
    table : pyarrow.Table
        Rows to check. All pixels need a wavelength; pixels that are not masked need a finite flux and an error that is
        either positive or NaN (not known).

    Raises
    ------
    ValueError
        Naming the column, what was expected, what was found and in which row.
    """
    for name in _RESERVED:
        if name not in table.column_names:
            raise ValueError(f"{name}: expected a column of this name, got {table.column_names}")
    for name in ("object_id", "survey"):
        if table.schema.field(name).type not in (pa.string(), pa.large_string()):
            raise ValueError(f"{name}: expected type string, got {table.schema.field(name).type}")
        if table[name].null_count:
            raise ValueError(f"{name}: expected a text in every row, got {table[name].null_count} rows without one")
    labels = label_names_of(table.column_names)
    for name in ("snr", *labels, *(f"{label}_err" for label in labels)):
        if table.schema.field(name).type != pa.float32():
            raise ValueError(f"{name}: expected type float32, got {table.schema.field(name).type}")
    for label in labels:
        error = table[f"{label}_err"].to_numpy()
        if (error < 0).any():
            row = int(np.argmax(error < 0))
            raise ValueError(f"{label}_err: expected no negative value, got {error[row]} in row {row}")

    pixels: dict[str, NDArray[Any]] = {}
    row_lengths = np.empty(0, np.int64)
    for name in PIXEL_COLUMNS:
        expected, actual = pa.bool_() if name == "mask" else pa.float32(), table.schema.field(name).type
        if not hasattr(actual, "value_type") or actual.value_type != expected:
            raise ValueError(f"{name}: expected type list<{expected}>, got {actual}")
        if table[name].null_count:
            raise ValueError(f"{name}: expected a list in every row, got {table[name].null_count} rows without one")
        pixels[name], lengths = flat_pixels(table[name])
        if name == "wavelength":
            row_lengths = lengths
        if (lengths != row_lengths).any():
            row = int(np.argmax(lengths != row_lengths))
            expected = f"{row_lengths[row]} pixels as in wavelength"
            raise ValueError(f"{name}: expected {expected}, got {lengths[row]} in row {row}")
    good = ~pixels["mask"].astype(bool)
    rules = (
        ("wavelength", "finite and positive Angstrom", np.isfinite(pixels["wavelength"]) & (pixels["wavelength"] > 0)),
        ("flux", "finite where mask is False", np.isfinite(pixels["flux"]) | ~good),
        ("flux_error", "positive, or NaN, where mask is False", ~(pixels["flux_error"] <= 0) | ~good),
    )
    for name, expected, right in rules:
        if not right.all():
            pixel = int(np.argmin(right))
            row = int(np.searchsorted(np.cumsum(row_lengths), pixel, side="right"))
            where = f"row {row} (object_id {table['object_id'][row].as_py()})"
            raise ValueError(f"{name}: expected {expected}, got {pixels[name][pixel]} in {where}")


def as_table(data: pa.Table | datasets.Dataset | Iterable[Mapping[str, Any]]) -> pa.Table:
    """Arrow table of a table, a `datasets.Dataset` or an iterable of rows (dicts)."""
    if isinstance(data, pa.Table):
        return data
    if hasattr(data, "with_format"):
        return data.with_format("arrow")[:]
    return _with_float32(pa.Table.from_pylist(list(data)))


def to_multimodal_universe(data: pa.Table | datasets.Dataset | Iterable[Mapping[str, Any]]) -> pa.Table:
    """Turn spectra of this schema into the layout of the Multimodal Universe data sets.

    Parameters
    ----------
    data : pyarrow.Table, datasets.Dataset or rows
        Spectra in the schema of this module.

    Returns
    -------
    pyarrow.Table
        ``spectrum: {flux, ivar, lsf_sigma, lambda, mask}``, then all other columns unchanged. A masked pixel has ivar
        0, so its error is given up; an unknown error is an ivar of NaN. ``lsf_sigma`` is NaN: the schema has none.

    Raises
    ------
    ValueError
        If `data` breaks the schema, or an error is too small for its inverse variance to fit in float32.

    References
    ----------
    The Multimodal Universe Collaboration (2024), arXiv:2412.02527.
    """
    table = as_table(data)
    validate_table(table)
    (wavelength, lengths), flux, flux_error, mask = (
        flat_pixels(table["wavelength"]),
        *(flat_pixels(table[name])[0] for name in PIXEL_COLUMNS[1:]),
    )
    with np.errstate(all="ignore"):
        ivar = np.where(mask, 0.0, flux_error.astype(np.float64) ** -2).astype(np.float32)
    if np.isinf(ivar).any():
        smallest = flux_error[np.isinf(ivar)].min()
        raise ValueError(f"flux_error: expected above 1e-19, as ivar is float32, got {smallest}; rescale the flux")
    parts = {"flux": flux, "ivar": ivar, "lsf_sigma": np.full_like(flux, np.nan), "lambda": wavelength, "mask": mask}
    spectrum = pa.StructArray.from_arrays([pixel_column(part, lengths) for part in parts.values()], names=list(parts))
    others = [name for name in table.column_names if name not in PIXEL_COLUMNS]
    # Without the metadata: it describes the columns of this schema, and `datasets` would believe it.
    return pa.table({"spectrum": spectrum, **{name: table[name] for name in others}})


def from_multimodal_universe(
    data: pa.Table | datasets.Dataset | Iterable[Mapping[str, Any]], *, survey: str | None = None
) -> pa.Table:
    """Turn rows in the layout of the Multimodal Universe into spectra of this schema.

    Parameters
    ----------
    data : pyarrow.Table, datasets.Dataset or rows
        ``object_id``, ``spectrum`` with at least flux, ivar and lambda (Angstrom; in vacuum, which is for the caller to
        know), and scalars such as ``teff`` or ``radial_velocity``.
    survey : str, optional
        What to put in ``survey`` where `data` has no such column.

    Returns
    -------
    pyarrow.Table
        Masked where ``mask`` is, where ivar is not above zero and where flux is not finite; ``flux_error`` is NaN
        there. Padding (lambda not above zero) is cut off. A known label without an error gets one of NaN.

    Raises
    ------
    ValueError
        If a part is missing, no survey is given, or ``restframe`` is false.
    """
    table = as_table(data)
    spectrum_type = table.schema.field("spectrum").type if "spectrum" in table.column_names else None
    if spectrum_type is None or not pa.types.is_struct(spectrum_type):
        actual = spectrum_type or table.column_names
        raise ValueError(f"spectrum: expected a struct of lists among the columns, got {actual}")
    stated = [field.name for field in spectrum_type]
    for name in ("flux", "ivar", "lambda"):
        if name not in stated:
            raise ValueError(f"spectrum.{name}: expected among the parts of spectrum, got {stated}")
    if "object_id" not in table.column_names:
        raise ValueError(f"object_id: expected a column of this name, got {table.column_names}")
    if "survey" not in table.column_names and not survey:
        raise ValueError("survey: expected a name, as the table has no such column, got None")
    if "restframe" in table.column_names and not pc.all(table["restframe"]).as_py():
        raise ValueError("restframe: expected True in every row, got False; shift the wavelengths first")

    parts: dict[str, NDArray[Any]] = {}
    spectrum = table["spectrum"].combine_chunks()
    for name in set(stated) & {"flux", "ivar", "lambda", "mask"}:
        parts[name], lengths = flat_pixels(pc.struct_field(spectrum, name))
    ivar, flux, wavelength = parts["ivar"], parts["flux"], parts["lambda"]
    mask = (ivar <= 0) | np.isinf(ivar) | ~np.isfinite(flux)
    if "mask" in parts:
        mask |= parts["mask"].astype(bool)
    with np.errstate(all="ignore"):
        flux_error = np.where(mask, np.nan, ivar.astype(np.float64) ** -0.5)
    keep = wavelength > 0
    rows = np.repeat(np.arange(len(lengths)), lengths)[keep]
    lengths = np.bincount(rows, minlength=len(lengths))
    pixels = {"wavelength": wavelength, "flux": flux, "flux_error": flux_error, "mask": mask}
    kept = [name for name in table.column_names if name not in ("spectrum", "restframe")]
    columns: dict[str, Any] = {name: table[name] for name in kept}
    columns |= {name: pixel_column(values[keep], lengths) for name, values in pixels.items()}
    columns["object_id"] = columns["object_id"].cast(pa.string())
    columns.setdefault("survey", pa.array([survey] * len(table), pa.string()))
    unknown = pa.array(np.full(len(table), np.nan, np.float32))
    columns.setdefault("snr", unknown)
    for name in LABEL_UNITS.keys() & columns.keys():
        columns.setdefault(f"{name}_err", unknown)

    labels = label_names_of(columns)
    label_columns = {*labels, *(f"{label}_err" for label in labels)}
    others = [name for name in columns if name not in label_columns and name not in _RESERVED]
    scalars = [name for name in others if pa.types.is_floating(columns[name].type)]
    order = [*spectrum_features(labels, scalars), *(name for name in others if name not in scalars)]
    result = _with_float32(pa.table({name: columns[name] for name in order}))
    validate_table(result)
    return result


def _with_float32(table: pa.Table) -> pa.Table:
    """The table with float64 columns and lists narrowed to float32, and missing numbers as NaN."""
    narrow = {pa.null(): pa.float32(), pa.float64(): pa.float32(), pa.list_(pa.float64()): pa.list_(pa.float32())}
    table = table.cast(pa.schema([field.with_type(narrow.get(field.type, field.type)) for field in table.schema]))
    columns = {name: table[name] for name in table.column_names}
    numbers = {name: column for name, column in columns.items() if column.type == pa.float32()}
    return pa.table(columns | {name: pc.fill_null(column, np.float32("nan")) for name, column in numbers.items()})


def valid_pixels(row: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Which pixels of a spectrum the tokenizer will use, shape (pixels,)."""
    valid = np.isfinite(row["flux"]) & ~np.asarray(row["mask"], bool)
    error = np.asarray(row["flux_error"])
    known = valid & (error > 0) & (error < HUGE)
    # Without any error at all, they are unknown, and the pixels still count.
    return known if known.any() else valid & np.isnan(error)
