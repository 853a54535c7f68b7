"""The nightly fuzzing, with few inputs; it finds planted faults."""

import importlib.util
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest


SCRIPT = Path(__file__).parents[3] / "scripts" / "checks" / "fuzz.py"
#: In place of the readers: an error that is none, a NaN, a message of several lines, the end of the process.
PLANTED = """
    import os, sys
    sys.path.insert(0, {scripts!r})
    import fuzz

    def broken(case, folder):
        kind = broken.count = broken.count + 1
        if kind % 10 == 3:
            raise KeyError("flux")
        if kind % 10 == 5:
            raise fuzz.Fault("teff: 1 that are not finite, without a flag")
        if kind % 10 == 7:
            raise ValueError("flux: expected\\nsomething")
        if kind % 10 == 8:
            raise ValueError("flux: expected numbers, got none")
        if kind == 29:
            os._exit(3)

    broken.count = 0
    fuzz.TRY["safetensors"] = broken
    sys.exit(fuzz.main())
"""


def run(script: Path, folder: Path, *options: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    command = [sys.executable, str(script), "--output", str(folder / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode in (0, 1), done.stderr
    return done, json.loads((folder / "out" / "fuzz.json").read_text())["runs"]


def test_planted_faults_are_distinguished_from_predictions_and_clear_errors(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import fuzz

    tried = []

    def broken(case, folder):
        tried.append(case.content)
        match zlib.crc32(case.content) % 3:
            case 0:
                raise KeyError("flux")
            case 1:
                raise ValueError("labels: expected numbers, got none")

    monkeypatch.setitem(fuzz.TRY, "tokenizer", broken)
    worker = fuzz.Worker("tokenizer", "hypothesis", 30, tmp_path, tmp_path)
    fuzz.by_hypothesis(worker, [], seed=0)
    kinds = [zlib.crc32(content) % 3 for content in tried]
    expected = {"inputs": 30, "fault": kinds.count(0), "refused": kinds.count(1), "answered": kinds.count(2)}
    assert worker.counts == expected and set(kinds) == {0, 1, 2}
    first, *others = map(json.loads, worker.log.read_text().splitlines())
    assert len(others) == worker.counts["fault"] - 1 and first["what"] == "KeyError"
    assert zlib.crc32(bytes.fromhex(first["content"])) % 3 == 0


@pytest.mark.slow  # it starts three processes, each of which loads all libraries
def test_a_planted_fault_is_found_counted_and_kept(tmp_path):
    text = "\n".join(line[4:] for line in PLANTED.format(scripts=str(SCRIPT.parent)).splitlines())
    (tmp_path / "planted.py").write_text(text)
    options = ("--targets", "safetensors", "--engines", "hypothesis", "--inputs", "40")
    done, [found] = run(tmp_path / "planted.py", tmp_path, *options)
    assert done.returncode == 1
    assert found["inputs"] == 40 == found["refused"] + found["answered"] + found["fault"]
    kinds = {fault["what"].partition(" at ")[0]: fault for fault in found["faults"]}
    assert kinds.keys() == {
        "KeyError",
        "teff: 1 that are not finite, without a flag",
        "ValueError that is not one line with a name",
        "the process ends with 3",
    }
    assert kinds["KeyError"]["inputs"] == 4 and "KeyError: 'flux'" in kinds["KeyError"]["trace"]
    kept = {path.name for path in (tmp_path / "out" / "faults").iterdir()}
    assert kept == {fault["file"] for fault in found["faults"]}
    assert "| safetensors | hypothesis | 40 |" in done.stdout


@pytest.mark.timeout(900)
@pytest.mark.slow  # each target is a process that loads all libraries
def test_each_target_has_no_fault_in_a_few_inputs(tmp_path):
    pixels = {"wavelength": np.arange(5000.0, 5040.0), "flux": np.linspace(0.9, 1.1, 40)}
    (tmp_path / "seeds").mkdir()
    np.savez(tmp_path / "seeds" / "a.npz", **pixels)
    from astropy.table import Table

    Table(pixels).write(tmp_path / "seeds" / "a.fits")
    engines = ["hypothesis", *(["atheris"] if importlib.util.find_spec("atheris") else [])]
    options = ("--inputs", "20", "--seeds", str(tmp_path / "seeds"), "--engines", *engines)
    done, runs = run(SCRIPT, tmp_path, *options)
    assert [(found["target"], found["inputs"]) for found in runs] == [
        (target, 20) for target in ("tokenizer", "readers", "statements", "config", "safetensors") for _ in engines
    ]
    assert done.returncode == int(any(found["fault"] for found in runs))
    assert all(found["faults"] == [] for found in runs), done.stdout


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"air": True}, None),  # flagged
        ({"air": True, "cards": {"AIRORVAC": "vacuum"}}, r"wavelength: off by -8\d\.\d km/s"),
        ({"air": True, "cards": {"AIRORVAC": "air"}, "velocity": 50.0}, None),  # flagged
        ({"velocity": 50.0, "cards": {"SPECSYS": "SOURCE", "AIRORVAC": "vacuum"}}, r"wavelength: off by 50\.\d km/s"),
        ({"flux_unit": "Jy", "error_unit": "mJy"}, None),
    ],
)
def test_wrong_statements_are_distinguished_from_right_ones(tmp_path, monkeypatch, changes, expected):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import fuzz_statements

    statements = {
        "form": "fits-table",
        "air": False,
        "velocity": 0.0,
        "wavelength_unit": "nm",
        "wavelength_name": "wave",
    }
    statements |= {
        "suffix": "",
        "flux_unit": "",
        "flux_name": "flux",
        "error_unit": "",
        "error_kind": "sigma",
        "rv": False,
    }
    statements |= {"rv_unit": "", "null": "-9999", "cards": {}, **changes}
    if expected is None:
        fuzz_statements.check(statements, tmp_path)
    else:
        with pytest.raises(fuzz_statements.Wrong, match=expected):
            fuzz_statements.check(statements, tmp_path)
