"""The benchmark of writing and reading data sets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[3] / "scripts" / "benchmarks" / "benchmark_data.py"


@pytest.mark.slow
def test_it_prints_a_table_and_saves_the_figures(tmp_path):
    command = [sys.executable, str(SCRIPT), "--n", "100", "--json", str(tmp_path / "figures.json"), str(tmp_path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert [line.split()[:2] for line in run.stdout.splitlines()[1:5]] == [
        ["written", "100"],
        ["read", "100"],
        ["written", "400"],
        ["read", "400"],
    ]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(figure["part"], figure["spectra"]) for figure in figures][-1] == ("read", 400)
    assert all(figure["per_second"] > 0 and figure["peak_mb"] > 0 for figure in figures)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
