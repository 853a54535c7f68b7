"""The table of faults."""

import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[3] / "scripts" / "checks" / "fault_table.py"


@pytest.mark.slow
def test_it_prints_the_tested_faults_and_returns_the_exit_code_of_pytest():
    run = subprocess.run([sys.executable, str(SCRIPT), "-k", "survives_a_build"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    header, rule, *rows = run.stdout.splitlines()
    assert header == "| fault | tried | survived | lost |" and set(rule) == set("|-")
    assert rows == ["| building a data set anew killed between its two renames | 1 | 1 | nothing |"]
    nothing = subprocess.run([sys.executable, str(SCRIPT), "-k", "no_such_test"], capture_output=True, text=True)
    assert nothing.returncode != 0 and nothing.stdout.splitlines() == [header, rule]
