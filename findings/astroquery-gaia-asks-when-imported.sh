#!/bin/sh
# `import astroquery.gaia` sends a request to the archive and prints its answer, or that there was none; nothing has been asked for yet.
#
#     sh findings/astroquery-gaia-asks-when-imported.sh
#
# It installs astroquery==0.4.11 numpy==2.4.6 astropy==8.0.2 into a temporary folder, notes which hosts are looked up, prints version, behaviour and output,
# and exits with another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check astroquery==0.4.11 numpy==2.4.6 astropy==8.0.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import socket
from importlib.metadata import version

asked = []


def refuse(host, *args, **kwargs):
    asked.append(host)
    raise OSError("no network in this test")


socket.getaddrinfo = refuse
import astroquery.gaia

print("astroquery", version("astroquery"), "| looked up by the import:", asked)
assert "gea.esac.esa.int" in asked
PYTHON
