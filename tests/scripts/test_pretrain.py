"""Pre-training: the commands with few stars and steps, and the calibration of errors."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from script_loader import load_script

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data import build_miles
from spectrafm_hf.synthesis.synthetic import SyntheticStars


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pretrain():
    return load_script("pretrain")


def test_curves_make_the_errors_right_in_every_bin_of_temperature_and_noise(pretrain):
    random = np.random.default_rng(0)
    n = 20_000
    teff, unknown = random.uniform(3500, 6500, n), random.uniform(-8, -4, n)
    sigma = np.full(n, 0.1)
    true = sigma * np.exp(0.4 * (teff - 5000.0) / 1000.0 - 0.2 * (unknown + 6.0))
    label_error = np.full(n, 0.05)
    residual = np.hypot(true, label_error) * random.standard_normal(n)
    residual[::20] = np.nan
    residual[1::50] *= 30.0  # labels that are plainly wrong
    knots = [pretrain.TEMPERATURES, np.percentile(unknown, pretrain.UNKNOWN_KNOTS)]
    design = [pretrain.interpolation(x, k) for x, k in zip((teff, unknown), knots, strict=True)]
    factor, curves = pretrain.error_curves(residual, sigma, label_error, design)
    assert [len(curve) for curve in curves] == [len(pretrain.TEMPERATURES), len(pretrain.UNKNOWN_KNOTS)]
    ln = sum(part @ np.array(curve) for part, curve in zip(design, curves, strict=True))
    z = np.abs(residual) / np.hypot(sigma * factor * np.exp(ln), label_error)
    for x in (teff, unknown):
        for part in np.array_split(np.argsort(x), 8):
            assert 1.4826 * np.nanmedian(z[part]) == pytest.approx(1.0, abs=0.08)
    assert curves[0][-1] == pytest.approx(0.0, abs=1e-6)  # no star is there


@pytest.fixture(scope="module")
def survey():
    return load_script("pretrain_survey")


def test_one_rung_is_replaced_and_all_else_stays_to_the_last_bit(survey):
    base, tokenizer = load_checkpoint("spectrafm-base")
    basis, rung = survey.basis_with(tokenizer.basis, ROOT / "is-not-written.safetensors")
    assert basis is tokenizer.basis and rung is basis.rungs[2]
    before = {name: values.clone() for name, values in base.state_dict().items()}
    own = ("model.rungs.2.", "means.2.", "log_variances.2.")
    for components, fresh in ((40, True), (None, False)):
        model, number = survey.with_rung(base, rung, components)
        assert number == 2 and model.config.rung_components[:3] == [110, 48, components or 96]
        after = model.state_dict()
        assert set(after) == set(before)
        for name, values in after.items():
            if not (fresh and name.startswith(own)):
                assert torch.equal(values, before[name]), name
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if name.startswith(own)}
        changed = "model.rungs.2.blocks.0.fc1.weight"
        assert torch.equal(after[changed], before[changed]) != fresh
    assert survey.placed([1, 2, 3], 1, 7) == [1, 7, 3] and survey.placed([1], 1, 7) == [1, 7]


def test_a_missing_network_cannot_be_resumed(survey):
    base, tokenizer = load_checkpoint("spectrafm-base")
    rung = dataclasses.replace(tokenizer.basis.rungs[2], first_interval=500)
    with pytest.raises(ValueError, match="components: expected their number"):
        survey.with_rung(base, rung)


def test_grids_have_gaps_and_windows_and_always_some_pixels(survey):
    rung = load_checkpoint("spectrafm-base")[1].basis.rungs[2]
    wavelength = np.exp(np.arange(*np.log(rung.range), 2e-4))
    shares = [survey.what_there_is(wavelength, np.random.default_rng(i)).mean() for i in range(200)]
    assert np.mean(np.array(shares) == 1.0) == pytest.approx(survey.WHOLE_GRIDS, abs=0.12)
    assert min(shares) < 0.3
    designs, powers = survey.random_designs(rung, 12, (2_700.0, 5_000.0), np.random.default_rng(0))
    assert len(designs) == len(powers) == 12 + len(survey.WINDOWS)
    telling = [sum(bool(rows.any()) for rows in design.rows) for design in designs]
    assert min(telling) >= survey.LEAST_INTERVALS
    partial = [min(len(rows[0]) for rows in design.rows) for design in designs[-2:]]
    assert max(partial) < 0.8 * max(len(rows[0]) for rows in designs[-2].rows)
    assert len(survey.random_designs(rung, 2, (500.0, 900.0), np.random.default_rng(0))[0]) == 2


def test_validation_stars_are_seen_in_parts_as_they_are_seen_together(survey):
    base, tokenizer = load_checkpoint("spectrafm-base")
    wavelength, generator = np.arange(4_000.0, 7_000.0, 1.0), np.random.default_rng(0)
    flux = (1.0 + 0.05 * generator.standard_normal((40, len(wavelength)))).astype(np.float32)
    stars = {"flux": flux, "flux_error": np.full_like(flux, 0.05), "mask": np.zeros(flux.shape, bool)}
    stars |= {"wavelength": wavelength, "resolving_power": wavelength / 2.5}
    for name in survey.LABELS:
        stars |= {name: np.ones(40, np.float32), f"{name}_err": np.zeros(40, np.float32)}
    collator = survey.Collator(tokenizer.basis, base.config, with_star_labels=False)
    together = collator(stars)
    part = collator(survey.Split(survey.with_tokens(tokenizer.basis, stars)).__getitems__([30, 7]))
    assert torch.equal(part["interval_ids"][0], together["interval_ids"][0])
    for name in ("coefficients", "reliability"):
        torch.testing.assert_close(part[name], together[name][[30, 7]], atol=0.02, rtol=0.02)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_three_commands_make_a_checkpoint_that_predicts(tmp_path):
    xp, generator = SyntheticStars("gaia-xp"), np.random.default_rng(0)
    for split, n in (("train", 900), ("validation", 120)):
        columns = {name: list(column) for name, column in xp.draw(n, generator).items()}
        (tmp_path / "xp").mkdir(exist_ok=True)
        Dataset.from_dict(columns).to_parquet(tmp_path / "xp" / f"{split}.parquet")
    miles = build_miles(tmp_path / "miles")
    few = {"per_device_train_batch_size": 32, "eval_strategy": "no", "save_strategy": "no", "dataloader_num_workers": 0}
    for script, recipe, changes in (
        ("pretrain.py", "base", {"data": str(tmp_path / "xp")}),
        (
            "pretrain_survey.py",
            "base-survey",
            {"start": str(tmp_path / "base" / "final"), "observed": str(miles), "stars": 600},
        ),
        ("pretrain_window.py", "base-window", {"start": str(tmp_path / "base-survey" / "final"), "stars": 600}),
    ):
        settings = yaml.safe_load((ROOT / "scripts" / "recipes" / f"{recipe}.yaml").read_text()) | few | changes
        (tmp_path / f"{recipe}.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, ROOT / "scripts" / script, tmp_path / f"{recipe}.yaml", "--max-steps", "3"]
        subprocess.run([*command, "--output-dir", tmp_path / recipe], check=True, capture_output=True, timeout=700)
    model, tokenizer = load_checkpoint(tmp_path / "base-window" / "final")
    parts = tokenizer.basis.rungs, model.config.rung_intervals, model.config.label_ranges, model.config.rung_error_knots
    assert [len(part) for part in parts] == [4, 4, 4, 4]
    grids = (3400.0, 10_000.0, 20.0), (15_200.0, 16_900.0, 0.2), (3700.0, 9000.0, 2.0), (8460.0, 8700.0, 0.1)
    for rung, (low, high, step) in enumerate(grids):
        wavelength = np.arange(low, high, step)
        inputs = tokenizer(wavelength, np.ones_like(wavelength), np.full_like(wavelength, 0.01))
        first, last = model.config.rung_intervals[rung]
        assert all(first <= interval < last for interval in inputs["interval_ids"].flatten().tolist())
        outputs = model(**inputs)
        assert outputs.predictions[0, :4].isfinite().all() and (outputs.prediction_errors[0, :4] > 0).all()


def test_the_rung_of_a_window_has_narrower_blocks_and_limits_from_warm_stars():
    window = load_script("pretrain_window")
    base, tokenizer = load_checkpoint("spectrafm-base")
    basis, rung = window.basis_with(tokenizer.basis, ROOT / "is-not-written.safetensors")
    assert basis is tokenizer.basis and rung is basis.rungs[3] and rung.least_inside == 0.9
    before = {name: values.clone() for name, values in base.state_dict().items()}
    model, number = window.with_rung(base, rung, 40, [16])
    assert number == 3 and model.config.rung_ffn_dim == [[384, 384]] * 3 + [[16]]
    assert model.state_dict()["model.rungs.3.blocks.0.fc1.weight"].shape == (8, 192, 16)
    others = [name for name in before if ".3." not in name]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in others)
    stars = {"teff": np.array([3_500.0, 5_000.0]), "flux": np.ones((2, 9)), "wavelength": np.arange(9.0)}
    warm = window.warm_of(stars | {"resolving_power": 11_500.0})
    assert warm["teff"].tolist() == [5_000.0] and warm["flux"].shape == (1, 9) and len(warm["wavelength"]) == 9
