#!/bin/sh
# One -- among numbers (the masked value of astropy) makes a column of CSV text to Arrow, and 00123 becomes 123.
#
# Guess, before it was run: -- is among the many words that Arrow takes for null; an identifier with zeros in front stays text.
#
#     sh findings/arrow-placeholder-makes-a-column-text.sh
#
# It installs pyarrow==26.0.1 astropy==8.0.2 into a temporary folder, makes its input itself, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 astropy==8.0.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import pyarrow
from astropy.table import MaskedColumn, Table
from pyarrow import csv

Table({"id": ["00123", "00456"], "teff": MaskedColumn([5000.0, 1.0], mask=[False, True])}).write("a.csv")
Table({"id": ["00123", "00456"], "teff": MaskedColumn([5000.0, 1.0], mask=[False, True])}).write(
    "b.txt", format="ascii.basic", delimiter=",", fill_values=[("", "--")]
)
open("c.csv", "w").write("id,teff\n00123,5000.0\n00456,--\n")
table = csv.read_csv("c.csv")
nulls = csv.ConvertOptions().null_values
print("pyarrow", pyarrow.__version__, "| taken for null:", nulls)
print(table.schema.to_string().replace("\n", ", "), "|", table["id"].to_pylist(), table["teff"].to_pylist())
assert "--" not in nulls and "NaN" in nulls and "N/A" in nulls
assert str(table.schema.field("teff").type) == "string"
assert table["id"].to_pylist() == [123, 456]
PYTHON
