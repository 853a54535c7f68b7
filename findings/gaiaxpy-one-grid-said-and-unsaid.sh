#!/bin/sh
# gaiaxpy.calibrate samples by itself at 336 to 1020 nm in steps of 2 nm; asked for just this grid, it gives other fluxes, by parts in a thousand.
#
#     sh findings/gaiaxpy-one-grid-said-and-unsaid.sh
#
# It installs gaiaxpy==2.1.5 numpy==2.4.6 pandas==3.1.1 into a temporary folder, makes its input itself, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gaiaxpy==2.1.5 numpy==2.4.6 pandas==3.1.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import pandas as pd
from gaiaxpy import calibrate

row = {"source_id": 1}
for band in ("bp", "rp"):
    row |= {f"{band}_n_parameters": 55, f"{band}_standard_deviation": 1.0, f"{band}_coefficient_errors": np.ones(55)}
    row |= {f"{band}_coefficients": 1e4 * np.exp(-np.arange(55.0)), f"{band}_coefficient_correlations": np.zeros(1485)}
unsaid, grid = calibrate(pd.DataFrame([row]), save_file=False)
said, same = calibrate(pd.DataFrame([row]), sampling=np.arange(336.0, 1021.0, 2.0), save_file=False)
assert np.array_equal(grid, same)
ratio = np.abs(said["flux"][0] - unsaid["flux"][0]).max() / np.abs(unsaid["flux"][0]).max()
print("\ngaiaxpy", version("gaiaxpy"), "| largest difference over largest flux, on one grid:", ratio)
assert ratio > 1e-5
PYTHON
