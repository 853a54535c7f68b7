"""The table of start-up times measures CPU time."""

import runpy
from pathlib import Path


SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "benchmarks" / "benchmark_startup.py"))


def test_a_process_that_works_costs_more_than_one_that_does_nothing(tmp_path):
    nothing, _ = SCRIPT["seconds"](["-c", "pass"], str(tmp_path))
    work, clock = SCRIPT["seconds"](["-c", "sum(range(20_000_000))"], str(tmp_path))
    assert 0 < nothing < work < clock + 0.1


def test_bad_arguments_are_answered_without_torch(tmp_path):
    used, _ = SCRIPT["seconds"](SCRIPT["PROGRAMS"]["spectrafm predict --bad"], str(tmp_path))
    torch, _ = SCRIPT["seconds"](SCRIPT["PROGRAMS"]["import torch"], str(tmp_path))
    assert used < 0.5 * torch
