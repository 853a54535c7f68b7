#!/bin/sh
# IRAF cuts its dispersions into cards of 68 letters. astropy strips blanks at the end of each, so joining them glues numbers.
#
# Guess, before it was run: joined cards give the text that was cut.
#
#     sh findings/fits-blanks-at-the-end-of-iraf-cards.sh
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
from astropy.io import fits

text = "wtype=multispec spec1 = \"1 1 0 4000. 0.123456789012 1024 0. 1. 20000 23.5\""
cut = [text[i : i + 68] for i in range(0, len(text), 68)]
text = cut[0][:67] + " " + cut[0][67:] + "".join(cut[1:])  # a blank where a card ends
cut = [text[i : i + 68] for i in range(0, len(text), 68)]
cards = "".join(f"WAT2_{i:03d}= \x27{part:<68}\x27".ljust(80) for i, part in enumerate(cut, 1))
header = fits.Header.fromstring(cards)
joined = "".join(header[f"WAT2_{i:03d}"] for i in range(1, len(cut) + 1))
padded = "".join(header[f"WAT2_{i:03d}"].ljust(68) for i in range(1, len(cut) + 1)).rstrip()
print("astropy", astropy.__version__)
print("written:        ", text)
print("joined:         ", joined)
print("padded, joined: ", padded)
assert joined != text and joined == text.replace(cut[0][-3:] + cut[1], cut[0][-3:].rstrip() + cut[1])
assert padded == text
PYTHON
