"""Calibration of errors in the optical: fitted to known errors, and written without a change of weights."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spectrafm_hf import bundled, load_checkpoint
from spectrafm_hf.data import build_miles
from spectrafm_hf.synthesis.survey_spectra import DrawnSpectra


ROOT = Path(__file__).parents[2]
KNOTS = [[4_000.0, 5_000.0, 6_000.0], [-2.0, -1.0, 0.0]]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))  # it imports the other command
    try:
        spec = importlib.util.spec_from_file_location("calibrate_survey", ROOT / "scripts" / "calibrate_survey.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def columns():
    """Errors that are too small by 1.5 for what is hardly seen, and of observed stars ten spectra each."""
    random, n = np.random.default_rng(0), 6_000
    group = np.repeat([0, 1, 2], n // 3)
    found = {"group": group, "teff": random.uniform(4_000, 6_000, n), "unknown": random.uniform(-2.0, 0.0, n)}
    found["star"] = np.where(group == 0, np.arange(n) // 10, 1_000_000 + np.arange(n))
    found["name"] = np.where(group == 0, "observed, drawn", "synthetic, drawn")
    found["sigma"] = np.full((n, 2), (100.0, 0.1))
    found["label_error"] = np.where((group == 0)[:, None], (60.0, 0.1), 0.0)
    true = found["sigma"] * np.where(found["unknown"] > -1.0, 1.5, 1.0)[:, None]
    found["residual"] = np.hypot(true, found["label_error"]) * random.standard_normal((n, 2))
    return found


def test_curves_find_where_errors_are_too_small_and_hold_for_the_other_half(script, columns):
    curves = script.fitted(columns, KNOTS)
    factors = script.factors(columns, KNOTS, curves)
    crossed = script.cross_checked(columns, KNOTS)
    little = columns["unknown"] > -0.4
    for found in (factors, crossed):
        assert np.median(found[little]) == pytest.approx(1.5, abs=0.15)
        assert np.median(found[columns["unknown"] < -1.6]) == pytest.approx(1.0, abs=0.1)
    assert not np.array_equal(factors, crossed)
    lines = list(script.table(columns, crossed, ["teff", "logg"]))
    (line,) = [line for line in lines if line.startswith("| synthetic, unknown -0.2 to -0.1 ")]
    before, after = (float(cell.split(" / ")[0]) for cell in line.split(" | ")[2:4])
    assert before == pytest.approx(1.5, abs=0.2) and after == pytest.approx(1.0, abs=0.15)


def test_stars_of_a_group_count_the_same_however_often_they_are_seen(script, columns):
    columns["star"][:500] = 7
    counts = script.counts_of(columns)
    for group in range(3):
        assert counts[columns["group"] == group].sum() == pytest.approx(script.STARS)
    assert counts[:500].sum() == pytest.approx(counts[columns["star"] == 100].sum())


def test_answers_are_compared_with_labels_and_only_published_ones_have_errors(script):
    model, tokenizer = load_checkpoint("spectrafm-base")
    wavelength = np.arange(4_000.0, 7_000.0, 1.0)
    row = {"object_id": "0", "wavelength": wavelength, "flux": np.ones(3_000, np.float32), "resolving_power": 2_000.0}
    row |= {"flux_error": np.full(3_000, 0.01, np.float32), "mask": np.zeros(3_000, bool)}
    labels = {"teff": np.array([5_000.0]), "logg": np.array([4.0]), "fe_h": np.array([0.0])}
    for kind, errors in (("observed", [56.57, 0.1061, 0.0566, 0.0]), ("synthetic", [0.0] * 4)):
        drawn = DrawnSpectra(kind, "drawn", [row], np.array([3]), labels)
        found = script.answers_of(model, tokenizer, 2, drawn)
        np.testing.assert_allclose(found["label_error"][0], errors, rtol=1e-3)
        assert found["residual"][0, 0] == pytest.approx(found["teff"][0] - 5_000.0)
        assert np.isnan(found["residual"][0, 3]) and found["unknown"][0] < 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_changes_errors_of_the_optical_and_nothing_else(script, tmp_path, monkeypatch, capsys):
    miles = build_miles(tmp_path / "miles")
    for name, value in (("OBSERVED_DRAWS", 6), ("SYNTHETIC_STARS", 60), ("SYNTHETIC_DRAWS", 6)):
        monkeypatch.setattr(script, name, value)
    out = tmp_path / "calibrated"
    command = [bundled("spectrafm-base"), "--miles", str(miles), "--output", str(out)]
    assert script.main([*command, "--table", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text().strip() == capsys.readouterr().out.strip()
    old, new = (load_checkpoint(path)[0] for path in (bundled("spectrafm-base"), str(out)))
    for name, values in old.state_dict().items():
        assert torch.equal(values, new.state_dict()[name]), name
    before, after = old.config.to_dict(), new.config.to_dict()
    changed = {name for name in before if before[name] != after[name]} - {"_name_or_path"}
    assert changed == {"rung_error_knots", "rung_error_curves"}
    for name in changed:
        assert before[name][:2] == after[name][:2] and after[name][2]
    ranges = (json.loads((Path(path) / "training_range.json").read_text()) for path in (bundled("spectrafm-base"), out))
    assert next(ranges) == next(ranges)
    shutil.rmtree(out)


def test_a_model_without_a_rung_of_the_optical_is_refused(script, tmp_path, monkeypatch):
    model, tokenizer = load_checkpoint("spectrafm-base")
    monkeypatch.setattr(tokenizer, "basis", None)
    monkeypatch.setattr(script, "load_checkpoint", lambda name: (model, tokenizer))
    with pytest.raises(ValueError, match="model: expected one with a rung of the optical, got mine"):
        script.main(["mine", "--miles", str(tmp_path), "--output", str(tmp_path / "out")])
