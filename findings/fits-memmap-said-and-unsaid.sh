#!/bin/sh
# fits.open(path) reads a scaled image; fits.open(path, memmap=True), which the documentation calls the default, does not.
#
# Guess, before it was run: both raise, as use_memmap is True by default.
#
#     sh findings/fits-memmap-said-and-unsaid.sh
#
# It installs astropy==8.0.2 into a temporary folder, makes its input itself, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check astropy==8.0.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import astropy
import numpy as np
from astropy.io import fits

fits.PrimaryHDU(np.array([1, 2, 3], np.uint16)).writeto("mask.fits")
print("astropy", astropy.__version__, "| fits.conf.use_memmap", fits.conf.use_memmap)
with fits.open("mask.fits") as hdus:
    print("memmap not given:", hdus[0].data)
    unsaid = hdus[0].data.tolist()
with fits.open("mask.fits", memmap=True) as hdus:
    try:
        said = hdus[0].data.tolist()
    except ValueError as error:
        said = str(error)
print("memmap=True:", said)
assert fits.conf.use_memmap and unsaid == [1, 2, 3]
assert "Cannot load a memory-mapped image" in said
PYTHON
