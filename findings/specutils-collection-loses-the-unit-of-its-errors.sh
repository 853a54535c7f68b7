#!/bin/sh
# A SpectrumCollection of specutils: its uncertainty has no unit, though its flux has one, and each of its spectra has both.
#
# Guess, before it was run: the uncertainty of the collection has the unit of its flux, as that of a Spectrum has.
#
#     sh findings/specutils-collection-loses-the-unit-of-its-errors.sh
#
# It installs specutils==2.4.0 astropy==8.0.2 into a temporary folder, makes its input itself, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check specutils==2.4.0 astropy==8.0.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import specutils
from astropy import units as u
from astropy.nddata import StdDevUncertainty

flux = np.ones((2, 9)) * u.Unit("erg s-1 cm-2 AA-1")
axis = np.tile(np.linspace(5000, 5100, 9), (2, 1)) * u.AA
both = specutils.SpectrumCollection(flux=flux, spectral_axis=axis, uncertainty=StdDevUncertainty(0.1 * np.ones((2, 9))))
one = specutils.Spectrum(flux=flux[0], spectral_axis=axis[0], uncertainty=StdDevUncertainty(0.1 * np.ones(9)))
print("specutils", specutils.__version__, "| collection:", repr(both.uncertainty.unit), "| spectrum:", one.uncertainty.unit)
assert both.uncertainty.unit is None and one.uncertainty.unit == both.flux.unit
PYTHON
