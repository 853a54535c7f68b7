"""Spectra with labels as Hugging Face data sets: schema, sources and builders."""

from .gaia_xp import build_gaia_xp, demo_stars, split_of_star
from .schema import (
    LABEL_UNITS,
    PIXEL_COLUMNS,
    SCALAR_UNITS,
    as_table,
    flat_pixels,
    from_multimodal_universe,
    label_names_of,
    pixel_column,
    spectrum_features,
    to_multimodal_universe,
    validate_table,
)
from .sources import cache_dir, fetch_package_file, read_member


__all__ = [
    "LABEL_UNITS",
    "PIXEL_COLUMNS",
    "SCALAR_UNITS",
    "as_table",
    "build_gaia_xp",
    "cache_dir",
    "demo_stars",
    "fetch_package_file",
    "flat_pixels",
    "from_multimodal_universe",
    "label_names_of",
    "pixel_column",
    "read_member",
    "spectrum_features",
    "split_of_star",
    "to_multimodal_universe",
    "validate_table",
]
