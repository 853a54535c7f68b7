#!/bin/sh
# A table with flux in Jy and uncertainty in mJy: specutils reads the spectrum without its uncertainty.
#
# Guess, before it was run: the uncertainty is converted to Jy.
#
#     sh findings/specutils-uncertainty-in-another-unit.sh
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
import astropy.units as u
import numpy as np
import specutils
from astropy.table import Table

wavelength, flux = np.arange(5000.0, 5010.0) * u.AA, np.ones(10) * u.Jy
Table({"wavelength": wavelength, "flux": flux, "uncertainty": np.full(10, 20.0) * u.mJy}).write("a.fits")
Table({"wavelength": wavelength, "flux": flux, "uncertainty": np.full(10, 0.02) * u.Jy}).write("b.fits")
read = {name: specutils.Spectrum.read(name, format="tabular-fits").uncertainty for name in ("a.fits", "b.fits")}
print("specutils", specutils.__version__)
print("uncertainty in mJy beside flux in Jy:", read["a.fits"])
print("uncertainty in Jy beside flux in Jy: ", read["b.fits"].quantity[:2])
assert read["a.fits"] is None
assert np.allclose(read["b.fits"].quantity.to_value("Jy"), 0.02)
PYTHON
