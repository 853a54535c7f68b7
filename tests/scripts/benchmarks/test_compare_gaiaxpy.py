"""The comparison with GaiaXPy, on fake sources and few stars."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits


ROOT = Path(__file__).parents[3]


def write_sources(path):
    rng, columns = np.random.default_rng(0), [fits.Column("source_id", "K", array=[11, 12])]
    for band in ("bp", "rp"):
        columns.append(fits.Column(f"{band}_n_parameters", "I", array=[55, 55]))
        columns.append(fits.Column(f"{band}_standard_deviation", "E", array=[1.1, 1.2]))
        values = {
            "coefficients": rng.normal(size=(2, 55)) * 1e3 / (1 + np.arange(55)) + 1e4 * (np.arange(55) == 0),
            "coefficient_errors": rng.uniform(1, 30, (2, 55)),
            "coefficient_correlations": rng.normal(0, 0.01, (2, 1485)),
        }
        for name, numbers in values.items():
            array = np.empty(2, object)
            array[:] = list(numbers)
            columns.append(fits.Column(f"{band}_{name}", "PD()" if name == "coefficients" else "PE()", array=array))
    fits.BinTableHDU.from_columns(columns).writeto(path)


@pytest.mark.slow
def test_it_compares_all_formats_and_takes_the_time_of_each(tmp_path):
    if importlib.util.find_spec("gaiaxpy") is None:
        pytest.skip("needs GaiaXPy, the extra `gaia`")
    write_sources(tmp_path / "raw.fits")
    script = ROOT / "scripts" / "benchmarks" / "compare_gaiaxpy.py"
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "raw.fits")]
    command += ["--output", str(tmp_path / "gaia.md"), "--json", str(tmp_path / "all.json"), "--stars", "60"]
    subprocess.run([*command, "--rounds", "1", "--formats", "fits"], check=True, capture_output=True, timeout=500)
    found = json.loads((tmp_path / "all.json").read_text())
    assert len(found["equality"]) == 18
    assert max(max(line["flux"], line["flux_error"]) for line in found["equality"]) < 1e-6
    assert {line["bands"] for line in found["equality"]} == {"both", "no BP", "no RP"}
    assert [(line["what"], line["stars"]) for line in found["speed"]].count(("labels", 60)) == 1
    assert all(line["cpu_seconds"] > 0 and line["memory_mb"] > 100 for line in found["speed"])
    page = (tmp_path / "gaia.md").read_text()
    assert page.startswith("# Coefficients") and page.count("**labels written**") == 1


@pytest.mark.slow
def test_velocities_of_synthetic_stars_and_of_a_file(tmp_path):
    wavelength = 5000.0 + 0.25 * np.arange(2000)
    text = "".join(f"{w},{1 + 0.01 * np.sin(w)},0.01\n" for w in wavelength)
    (tmp_path / "wave.csv").write_text("wavelength,flux,error\n" + text)
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "checks" / "check_velocities.py"), str(tmp_path)]
    command += ["--output", str(tmp_path / "velocities.md"), "--stars", "3"]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    lines = (tmp_path / "velocities.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    synthetic = [row for row in rows if row[0] in ("APOGEE", "GALAH", "Gaia RVS", "LAMOST MRS", "LAMOST LRS")]
    assert len(synthetic) == 15
    for row in synthetic:
        limit = {"LAMOST LRS": 10.0, "Gaia RVS": 4.0}.get(row[0], 1.0)
        assert row[3].endswith(" of 3") and abs(float(row[4])) < limit
    assert [row[3] for row in rows if row[0] == "wave.csv"] == ["not significant"]
