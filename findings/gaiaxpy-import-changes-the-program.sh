#!/bin/sh
# `import gaiaxpy` changes how NumPy prints in the whole program (legacy 1.21), silences every RuntimeWarning in it, and has matplotlib
# set all texts with LaTeX: a program that drew pictures without LaTeX no longer can.
#
#     sh findings/gaiaxpy-import-changes-the-program.sh
#
# It installs gaiaxpy==2.1.5 numpy==2.4.6 pandas==3.1.1 into a temporary folder, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gaiaxpy==2.1.5 numpy==2.4.6 pandas==3.1.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

import matplotlib
import numpy as np

before = repr(np.float64(1.5)), np.get_printoptions()["legacy"], matplotlib.rcParams["text.usetex"]
import gaiaxpy

after = repr(np.float64(1.5)), np.get_printoptions()["legacy"], matplotlib.rcParams["text.usetex"]
silenced = any(kind == "ignore" and category is RuntimeWarning for kind, _, category, *_ in warnings.filters)
print("gaiaxpy", version("gaiaxpy"), "| before", before, "after", after, "| RuntimeWarning ignored:", silenced)
assert before == ("np.float64(1.5)", False, False) and after == ("1.5", "1.21", True) and silenced
PYTHON
