"""Training with the Trainer: it learns, resumes exactly, and saves what it evaluated."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from transformers import TrainingArguments

from spectrafm_hf.checkpoints import load_checkpoint, save_checkpoint
from spectrafm_hf.data import spectrum_features
from spectrafm_hf.prediction import TrainingRange
from spectrafm_hf.training import MuonWithAdamW, Recipe, prepare_model, train, whitening_matrices


ROOT = Path(__file__).parents[1]
PIXELS = np.linspace(4000, 4780, 40, dtype=np.float32)


def make_stars(n_stars: int, seed: int) -> Dataset:
    """Spectra whose slope is Teff and whose line is [Fe/H]."""
    generator = np.random.default_rng(seed)
    teff, fe_h = generator.uniform(4000, 6000, n_stars), generator.uniform(-1, 0.5, n_stars)
    shape = np.exp(-0.5 * ((PIXELS - 4400) / 40) ** 2)
    flux = 1 + (teff[:, None] - 5000) / 4000 * (PIXELS - 4390) / 390 - 0.2 * (fe_h[:, None] + 1.2) * shape
    flux += 0.01 * generator.standard_normal(flux.shape)
    rows = {
        "object_id": [str(i) for i in range(n_stars)],
        "survey": ["test"] * n_stars,
        "wavelength": [PIXELS] * n_stars,
        "flux": list(flux.astype(np.float32)),
        "flux_error": [np.full(PIXELS.size, 0.01, np.float32)] * n_stars,
        "mask": [np.zeros(PIXELS.size, bool)] * n_stars,
        "snr": [100.0] * n_stars,
        "teff": teff,
        "teff_err": np.full(n_stars, 20.0),
        "fe_h": np.where(generator.random(n_stars) < 0.1, np.nan, fe_h),
        "fe_h_err": np.full(n_stars, 0.01),
    }
    return Dataset.from_dict(rows, features=spectrum_features(["teff", "fe_h"], []))


@pytest.fixture(scope="module")
def stars() -> DatasetDict:
    return DatasetDict(train=make_stars(512, 1), validation=make_stars(128, 2))


def make_recipe(**changes) -> Recipe:
    model = {
        "patch_size": 8,
        "hidden_size": 32,
        "num_filters": 32,
        "num_frequencies": 4,
        "encoder_attention_heads": [2],
        "encoder_ffn_dim": [32],
        "decoder_attention_heads": [2],
        "decoder_ffn_dim": [32],
        "readout_dims": [32],
        "dropout": 0.05,
        "initializer_range": 0.05,
    }
    settings = {
        "labels": ["teff", "fe_h"],
        "units": ["K", "dex"],
        "model": model,
        "whitening": True,
        "noise": 0.5,
        "muon_learning_rate": 2e-2,
        "ema_decay": 0.9,
    }
    return Recipe(**{**settings, **changes})


def make_arguments(folder: Path, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 64,
        "num_train_epochs": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return TrainingArguments(**{**settings, **changes})


@pytest.fixture(scope="module")
def trained(stars, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return train(make_recipe(), make_arguments(folder), stars["train"], stars["validation"]), folder


def test_training_learns_the_labels_far_better_than_their_spread(trained):
    metrics = [entry for entry in trained[0].state.log_history if "eval_teff_robust_scatter" in entry]
    assert metrics[-1]["eval_teff_robust_scatter"] < 150  # of a spread of 740 K
    assert metrics[-1]["eval_fe_h_robust_scatter"] < 0.25  # of 0.56 dex
    assert {"eval_teff_bias", "eval_teff_rmse", "eval_teff_robust_z"} <= metrics[-1].keys()


def test_the_saved_checkpoint_gives_the_metrics_of_the_last_evaluation(trained, stars):
    trainer, folder = trained
    model, tokenizer = load_checkpoint(str(folder / "final"))
    rows = stars["validation"].with_format("numpy")[:]
    with torch.inference_mode():
        values = model.eval()(**tokenizer(rows)).values.numpy()
    error = values[:, 0] - rows["teff"]
    scatter = 1.4826 * np.median(np.abs(error - np.median(error)))
    logged = [entry for entry in trainer.state.log_history if "eval_teff_robust_scatter" in entry][-1]
    assert scatter == pytest.approx(logged["eval_teff_robust_scatter"], rel=1e-3)
    save_checkpoint(model, tokenizer, folder / "again")
    assert (folder / "again" / "config.json").read_bytes() == (folder / "final" / "config.json").read_bytes()
    training_range = TrainingRange.load(folder / "final")
    assert training_range is not None and training_range.labels.keys() == {"teff", "fe_h"}


def test_the_errors_of_the_trained_model_are_right_on_the_validation_stars(trained):
    trainer, _ = trained
    factors = dict(zip(trainer.model.config.label_names, trainer.model.config.label_error_factors, strict=True))
    metrics = trainer.evaluate()
    for name in ("teff", "fe_h"):
        assert factors[name] != 1.0
        assert metrics[f"eval_{name}_robust_z"] == pytest.approx(1.0, abs=0.02)


def test_a_resumed_run_ends_with_the_loss_and_the_weights_of_an_uninterrupted_one(trained, stars, tmp_path):
    whole, folder = trained
    resumed = train(
        make_recipe(),
        make_arguments(tmp_path, resume_from_checkpoint=str(folder / "checkpoint-32")),
        stars["train"],
        stars["validation"],
    )
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 64
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def test_the_whitening_matrices_leave_patches_without_correlation(stars):
    flux = np.stack(stars["train"].with_format("numpy")["flux"][:]) - 1.0
    matrices = whitening_matrices(flux, np.full_like(flux, 1e-3), 8, [slice(i, i + 8) for i in range(0, 40, 8)])
    assert matrices.shape == (5, 8, 8)
    white = flux[:, :8] @ matrices[0]
    covariance = np.cov(white.T)
    off_diagonal = covariance - np.diag(np.diag(covariance))
    assert np.abs(off_diagonal).max() < 0.3 * np.diag(covariance).max()
    np.testing.assert_allclose(matrices, np.swapaxes(matrices, 1, 2), atol=1e-4)


def test_the_prepared_model_carries_centres_and_scales_of_the_training_set(stars):
    torch.manual_seed(0)
    model, tokenizer, training_range = prepare_model(make_recipe(), [stars["train"].with_format("numpy")[:]])
    teff = np.asarray(stars["train"]["teff"])
    assert model.config.label_centers[0] == pytest.approx(np.median(teff), rel=1e-6)
    assert training_range.labels["teff"] == (pytest.approx(teff.min()), pytest.approx(teff.max()))
    flux = tokenizer(stars["train"].with_format("numpy")[:])["flux"]
    assert flux.median().abs() < 0.05, "standardised"


def test_with_softening_the_flux_is_a_ratio_to_the_typical_star_and_the_filters_see_its_logarithm(stars):
    recipe = make_recipe(tokenizer={"clip": 50.0})
    recipe.model = {**recipe.model, "flux_softening": 0.2}
    torch.manual_seed(0)
    model, tokenizer, _ = prepare_model(recipe, [stars["train"].with_format("numpy")[:]])
    inputs = tokenizer(stars["train"].with_format("numpy")[:])
    assert 0.95 < inputs["flux"].median() < 1.05
    embedding = model.model.embeddings.patch_embedding
    assert embedding.compress(torch.tensor(1.0)) == 0
    step = embedding.compress(torch.tensor([10.0, 20.0])).diff()
    torch.testing.assert_close(step, torch.tensor([np.log(2.0)], dtype=torch.float32), rtol=1e-3, atol=0)
    white = embedding.whiten(embedding.compress(inputs["flux"]), inputs["wavelength"])[:, 1]
    covariance = torch.cov(white.T)
    assert (covariance - covariance.diag().diag()).abs().max() < 0.5 * covariance.diag().max()


def test_a_label_that_the_data_set_does_not_hold_is_named(stars):
    with pytest.raises(ValueError, match=r"labels: expected columns .* got 'mg_fe'"):
        prepare_model(make_recipe(labels=["mg_fe"]), [stars["train"].with_format("numpy")[:]])


def test_two_instruments_share_a_model_and_their_tables_lie_side_by_side(stars):
    blue = stars["train"].with_format("numpy")[:]
    red = {**blue, "wavelength": blue["wavelength"] * 2, "flux": 3.0 * blue["flux"], "mg_fe": blue["fe_h"] + 1}
    torch.manual_seed(0)
    recipe = make_recipe(labels=["teff", "fe_h", "mg_fe"], units=["K", "dex", "dex"])
    model, tokenizer, training_range = prepare_model(recipe, [red, blue])
    assert np.all(np.diff(tokenizer.standardize_wavelength) > 0) and len(tokenizer.standardize_wavelength) == 80
    assert len(model.config.whitening_wavelength) == len(model.model.embeddings.patch_embedding.whitening) == 10
    assert training_range.wavelength is None and training_range.labels["mg_fe"][1] > 1
    for sample in (blue, red):
        tokens = tokenizer(sample["wavelength"], sample["flux"])["flux"]
        assert tokens.median().abs() < 0.05 and 0.7 < tokens.std() < 1.5
    with pytest.raises(ValueError, match="wavelength: expected instruments that do not overlap"):
        prepare_model(recipe, [red, {**blue, "wavelength": blue["wavelength"] + 500}, blue])


def test_spectra_on_different_grids_are_refused_where_a_table_is_measured(stars):
    moved = stars["train"].select(range(4)).with_format("numpy")
    moved = moved.map(lambda row, i: {"wavelength": row["wavelength"] + np.float32(i)}, with_indices=True)
    with pytest.raises(ValueError, match="wavelength: expected one grid"):
        prepare_model(make_recipe(), [moved.with_format("numpy")[:]])


def test_the_optimizer_moves_matrices_and_vectors_and_follows_a_scheduler():
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 4), (4,)))
    optimizer = MuonWithAdamW({"params": [matrix], "lr": 0.1}, [{"params": [vector], "lr": 0.1}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    for _ in range(2):
        (matrix.diag().sum() + vector.sum()).backward()
        optimizer.step()
        scheduler.step()
        moved = matrix.detach().clone(), vector.detach().clone()
        optimizer.zero_grad()
    assert not torch.equal(moved[0], torch.ones(4, 4)) and not torch.equal(moved[1], torch.ones(4))
    (matrix.diag().sum() + vector.sum()).backward()
    optimizer.step()  # the learning rate is 0 by now, for both of the inner optimizers
    assert torch.equal(matrix, moved[0]) and torch.equal(vector, moved[1])


def test_the_training_script_runs_a_recipe_from_yaml_with_overrides(stars, tmp_path):
    for split, data in stars.items():
        (tmp_path / "data" / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(tmp_path / "data" / "data" / f"{split}-00000-of-00001.parquet")
    assert load_dataset(str(tmp_path / "data")).keys() == stars.keys()
    recipe = {**vars(make_recipe()), "data": str(tmp_path / "data")}
    arguments = {"per_device_train_batch_size": 64, "num_train_epochs": 1, "report_to": "none", "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **arguments, "output_dir": "elsewhere"}))
    command = [sys.executable, ROOT / "scripts" / "train.py", "recipe.yaml", "--output_dir", "out", "--max_steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()
    with (tmp_path / "out" / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert curves[-1]["step"] == "3" and float(curves[-1]["train_loss"]) > 0
