"""The cost of a survey, measured on a small one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[3] / "scripts" / "benchmarks" / "benchmark_survey.py"


@pytest.mark.slow
def test_the_memory_of_a_survey_is_that_of_a_quarter_of_it(tmp_path):
    """As with a million stars, for which the same command takes minutes."""
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), "--shard", "2000", "--stars", "4000", "16000"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    few, many = json.loads((tmp_path / "survey.json").read_text())["surveys"]
    assert (few["stars"], many["stars"], many["shards"]) == (4000, 16000, 8)
    assert few["peak_memory_mb"] > 100 and many["peak_memory_mb"] < min(1.1 * few["peak_memory_mb"], 2000)
    assert f"| 16,000 | 8 | {many['seconds']:,.0f} |" in run.stdout == (tmp_path / "survey.md").read_text()
