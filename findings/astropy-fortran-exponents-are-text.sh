#!/bin/sh
# Numbers as Fortran prints them (1.0D-03) make a column of text to astropy's Table.read, without a warning. pandas does the same; numpy refuses them.
#
#
#     sh findings/astropy-fortran-exponents-are-text.sh
#
# It installs astropy==8.0.2 pandas==3.1.1 into a temporary folder, makes its input itself, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check astropy==8.0.2 pandas==3.1.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import pandas as pd
from astropy.table import Table

open("star.txt", "w").write("wave flux\n5.000D+03 1.0D-03\n5.001D+03 2.0D-03\n")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    guessed = Table.read("star.txt", format="ascii")
    named = Table.read("star.txt", format="ascii.basic", fast_reader={"exponent_style": "fortran"})
print("astropy", version("astropy"), "pandas", version("pandas"))
print("ascii:                                ", guessed["flux"].dtype, guessed["flux"].tolist())
print("ascii.basic, exponent_style='fortran':", named["flux"].dtype, named["flux"].tolist())
frame = pd.read_csv("star.txt", sep=" ")
print("pandas:                               ", frame["flux"].dtype, frame["flux"].tolist())
try:
    np.loadtxt("star.txt", skiprows=1)
except ValueError as error:
    print("numpy.loadtxt:                        ", str(error)[:60])
else:
    raise AssertionError("numpy.loadtxt reads them now")
assert guessed["flux"].dtype.kind == "U" and not caught
assert named["flux"].tolist() == [1e-3, 2e-3]
assert not pd.api.types.is_numeric_dtype(frame["flux"])
PYTHON
