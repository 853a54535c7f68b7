#!/bin/sh
# A one-dimensional image with DC-FLAG = 1 (IRAF: the axis is log10 of the wavelength): specutils gives wavelengths of 3.5 Angstrom.
#
# Guess, before it was run: wavelengths from 3,400 Angstrom.
#
#     sh findings/specutils-log-linear-image.sh
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
from astropy.io import fits

hdu = fits.PrimaryHDU(np.ones(100))
hdu.header.update({"CTYPE1": "LINEAR", "CUNIT1": "Angstrom", "CRVAL1": np.log10(3400.0), "CDELT1": 1e-4, "CRPIX1": 1.0, "DC-FLAG": 1})
hdu.writeto("a.fits")
axis = specutils.Spectrum.read("a.fits", format="wcs1d-fits").spectral_axis
print("specutils", specutils.__version__, "| first and last of the axis:", axis[[0, -1]])
assert abs(axis.to_value("Angstrom")[0] - np.log10(3400.0)) < 1e-6
PYTHON
