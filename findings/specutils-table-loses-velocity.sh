#!/bin/sh
# A Spectrum with a radial velocity, written with format="tabular-fits" and read again: the velocity is 0 km/s, without a warning. The mask comes back.
#
#
#     sh findings/specutils-table-loses-velocity.sh
#
# It installs specutils==2.4.0 astropy==8.0.2 into a temporary folder, makes its input itself, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check specutils==2.4.0 astropy==8.0.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

import astropy.units as u
import numpy as np
from astropy.nddata import StdDevUncertainty
from specutils import Spectrum

spectrum = Spectrum(
    spectral_axis=[5000.0, 5001.0, 5002.0] * u.AA,
    flux=[1.0, 2.0, 3.0] * u.Jy,
    uncertainty=StdDevUncertainty([0.1, 0.1, 0.1], unit=u.Jy),
    mask=np.array([False, True, False]),
    radial_velocity=100 * u.km / u.s,
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    spectrum.write("star.fits", format="tabular-fits")
    again = Spectrum.read("star.fits", format="tabular-fits")
print("specutils", version("specutils"))
print("written:", spectrum.radial_velocity, spectrum.mask, spectrum.uncertainty.array)
print("read:   ", again.radial_velocity, again.mask, again.uncertainty.array)
print("warnings that name the velocity:", [str(w.message) for w in caught if "veloc" in str(w.message)])
assert spectrum.radial_velocity == 100 * u.km / u.s and again.radial_velocity == 0 * u.km / u.s
assert again.mask.tolist() == [False, True, False]
np.testing.assert_allclose(again.uncertainty.array, 0.1)
assert not [w for w in caught if "veloc" in str(w.message)]
PYTHON
