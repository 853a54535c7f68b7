#!/bin/sh
# A FITS column of whole numbers with a null value (TNULL): astropy's Table masks it, unless the column has a scale.
#
# Guess, before it was run: masked in both, as section 7.3.2 of the FITS standard defines TNULL before the scale is applied.
#
#     sh findings/fits-null-of-a-scaled-column.sh
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
from astropy.table import Table

column = fits.Column("flux", "J", array=np.array([10, -99, 30], np.int32), null=-99)
fits.BinTableHDU.from_columns([column]).writeto("plain.fits")
# The same with TSCAL1 and TZERO1, as packed tables have them.
raw = open("plain.fits", "rb").read()
end = raw.index(b"END".ljust(80), 2880)
cards = b"".join(f"{key:8s}= {value:>20}".ljust(80).encode() for key, value in (("TSCAL1", "0.5"), ("TZERO1", "7.0")))
open("scaled.fits", "wb").write(raw[:end] + cards + b"END".ljust(80) + raw[end + 240 :])

plain, scaled = (Table.read(name)["flux"] for name in ("plain.fits", "scaled.fits"))
print("astropy", astropy.__version__)
print("without a scale:", plain.tolist())
print("with a scale:   ", np.ma.asarray(scaled).tolist(), "(-99 * 0.5 + 7 = -42.5 is the null value)")
assert plain.tolist() == [10, None, 30]
assert np.ma.asarray(scaled).tolist() == [12.0, -42.5, 22.0]
assert not np.ma.getmaskarray(scaled).any()
PYTHON
