#!/bin/sh
# A data set of float64 (datasets), in the format "numpy": its arrays are float32, though the features still say float64; as plain rows they are exact.
#
# Guess, before it was run: float64, as the features say.
#
#     sh findings/datasets-numpy-format-is-single-precision.sh
#
# It installs datasets==5.2.0 numpy==2.4.6 into a temporary folder, makes its input itself, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 numpy==2.4.6
cd "$folder"
HF_HOME="$folder/hf" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import datasets
import numpy as np

wavelength = 15000.0 + 0.001 * np.arange(3)
data = datasets.Dataset.from_dict({"wavelength": [wavelength]})
row = data.with_format("numpy")[0]["wavelength"]
print("datasets", datasets.__version__, "| feature:", data.features["wavelength"], "| array:", row.dtype, row - 15000)
assert data.features["wavelength"].feature.dtype == "float64" and row.dtype == np.float32
assert np.array_equal(data[0]["wavelength"], wavelength) and not np.array_equal(row, wavelength)
PYTHON
