"""The checks of a GPU also run on the CPU, and failures are reported."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from script_loader import load_script


SCRIPT = Path(__file__).parents[3] / "scripts" / "benchmarks" / "check_gpu.py"
# What the libraries of quantisation warn of when they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/check_gpu")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_of_it_runs_on_the_cpu(script, capsys):
    assert script.main(["--device", "cpu"]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == f"torch {torch.__version__} on cpu" and last.startswith("pass: 0 failed, ")
    assert [line[6:].partition(":")[0] for line in lines] == [name.partition(":")[0] for name in script.CHECKS]
    assert {line[:4] for line in lines} <= {"pass", "skip"}
    skipped = [line for line in lines if line.startswith("skip")]
    reasons = ("GPU", "compiler", "is not installed")
    assert all(any(reason in line for reason in reasons) for line in skipped), skipped


def test_a_failing_check_is_reported_and_the_others_run(script, monkeypatch, capsys):
    def fails(bench):
        raise RuntimeError("CUDA error:\n  of many lines")

    def skips(bench):
        raise script.Skip("needs two GPUs")

    checks = {"one": fails, "two": skips, "three": lambda bench: "all well"}
    monkeypatch.setattr(script, "CHECKS", checks)
    bench = SimpleNamespace(device=torch.device("cpu"))
    assert script.run(bench) == 1
    assert capsys.readouterr().out.splitlines() == [
        "FAIL  one: RuntimeError: CUDA error: of many lines",
        "skip  two: needs two GPUs",
        "pass  three: all well",
    ]
    assert script.run(bench, "three") == 0


def test_answers_that_changed_too_much_fail(script, monkeypatch):
    right = {"XP": (np.array([[5000.0]]), np.array([[50.0]]))}
    bench = SimpleNamespace(inputs={"XP": {}}, expected=right, here=lambda inputs: inputs)
    for found, passes in (((5000.4, 50.0), True), ((5001.0, 50.0), False), ((5000.0, 51.0), False)):
        monkeypatch.setattr(script, "answers", lambda *_, found=found: {"XP": tuple(np.array([[x]]) for x in found)})
        if passes:
            assert "0.0080 of their errors" in script.Bench.compared(bench, None, script.SAME)
        else:
            with pytest.raises(AssertionError, match="expected at most 0.01 and 0.5 %"):
                script.Bench.compared(bench, None, script.SAME)


def test_a_missing_device_is_one_line_and_exit_code_2(script, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("check_gpu.py: device: expected one of auto, cpu, got cuda")
