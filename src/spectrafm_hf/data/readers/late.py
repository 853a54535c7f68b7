# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Parts of astropy that are imported at their first use: the list of formats does not need them."""

from typing import TYPE_CHECKING

from ...lazy import LateModule


if TYPE_CHECKING:
    from astropy import units as units
    from astropy.io import fits as fits
else:
    fits, units = LateModule("astropy.io.fits"), LateModule("astropy.units")
