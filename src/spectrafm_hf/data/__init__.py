"""Spectra with labels as Hugging Face data sets: schema, sources and builders."""

from typing import TYPE_CHECKING

from ..lazy import names_for_types


if TYPE_CHECKING:
    from .apogee import build_apogee_demo as build_apogee_demo
    from .apogee import build_apogee_dr17 as build_apogee_dr17
    from .building import Card as Card
    from .building import write_dataset as write_dataset
    from .from_files import build_from_files as build_from_files
    from .gaia_xp import build_gaia_xp as build_gaia_xp
    from .gaia_xp import demo_stars as demo_stars
    from .gaia_xp import split_of_star as split_of_star
    from .miles import build_miles as build_miles
    from .schema import LABEL_UNITS as LABEL_UNITS
    from .schema import PIXEL_COLUMNS as PIXEL_COLUMNS
    from .schema import SCALAR_UNITS as SCALAR_UNITS
    from .schema import as_table as as_table
    from .schema import flat_pixels as flat_pixels
    from .schema import from_multimodal_universe as from_multimodal_universe
    from .schema import label_names_of as label_names_of
    from .schema import pixel_column as pixel_column
    from .schema import spectrum_features as spectrum_features
    from .schema import to_multimodal_universe as to_multimodal_universe
    from .schema import validate_table as validate_table
    from .sources import cache_dir as cache_dir
    from .sources import fetch_package_file as fetch_package_file
    from .sources import read_member as read_member
    from .zenodo import build_original_zenodo as build_original_zenodo

__getattr__, __all__ = names_for_types(__name__, __file__)
