"""Spectra with labels as Hugging Face data sets: schema, sources and builders."""

from typing import TYPE_CHECKING

from ..lazy import names_of


if TYPE_CHECKING:
    from .apogee import build_apogee_demo, build_apogee_dr17
    from .building import Card, write_dataset
    from .from_files import build_from_files
    from .gaia_xp import build_gaia_xp, demo_stars, split_of_star
    from .miles import build_miles
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
    from .zenodo import build_original_zenodo

_MODULES = {
    "apogee": ("build_apogee_demo", "build_apogee_dr17"),
    "building": ("Card", "write_dataset"),
    "from_files": ("build_from_files",),
    "gaia_xp": ("build_gaia_xp", "demo_stars", "split_of_star"),
    "miles": ("build_miles",),
    "schema": (
        "LABEL_UNITS",
        "PIXEL_COLUMNS",
        "SCALAR_UNITS",
        "as_table",
        "flat_pixels",
        "from_multimodal_universe",
        "label_names_of",
        "pixel_column",
        "spectrum_features",
        "to_multimodal_universe",
        "validate_table",
    ),
    "sources": ("cache_dir", "fetch_package_file", "read_member"),
    "zenodo": ("build_original_zenodo",),
}
__getattr__ = names_of(__name__, _MODULES)

__all__ = [
    "Card",
    "LABEL_UNITS",
    "PIXEL_COLUMNS",
    "SCALAR_UNITS",
    "as_table",
    "build_apogee_demo",
    "build_apogee_dr17",
    "build_from_files",
    "build_gaia_xp",
    "build_miles",
    "build_original_zenodo",
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
    "write_dataset",
]
