"""The benchmark of speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[3] / "scripts" / "benchmarks" / "benchmark.py"


@pytest.mark.slow
def test_it_prints_a_table_and_saves_the_figures_of_each_round(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rounds", "2", "--stars", "4"]
    run = subprocess.run([*command, "--output", str(tmp_path)], check=True, capture_output=True, text=True)
    content = json.loads((tmp_path / "benchmark.json").read_text())
    measured = content["measured"]
    assert len(content["peak_gflop_per_s"]) == 2 and content["machine"]["versions"]["torch"]
    for title, figures in measured.items():
        assert f"| {title} |" in run.stdout
        assert len(figures["stars_per_s"]) == 2 and min(figures["stars_per_s"]) > 0
    shares = measured["apogee: forward pass"]["share_of_peak"]
    assert len(shares) == 2 and 0 < min(shares) < max(shares) < 1.5
    # The operations of 15 windows are the same, one by one or together, and 15 windows are more than a forward pass.
    ways = [f"published model: {way}" for way in ("window by window", "a star's windows as a batch")]
    rates = [measured[way]["stars_per_s"][0] for way in ways]
    assert max(rates) < measured["apogee: forward pass"]["stars_per_s"][0]


@pytest.mark.slow
def test_it_draws_the_cost_of_a_star_against_three_quantities(tmp_path):
    command = [sys.executable, str(SCRIPT), "--curves", "--most-stars", "1000", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    curves = json.loads((tmp_path / "curves.json").read_text())["milliseconds_per_star"]
    assert [len(points) for points in curves.values()] == [2, 9, 4]
    pixels = dict(map(tuple, curves["pixels of a spectrum"]))
    assert pixels[100_000] > 10 * pixels[1000] > 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
