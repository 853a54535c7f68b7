"""Training with the Trainer: it learns, resumes exactly, and saves what it evaluated."""

import csv
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import Trainer, TrainingArguments

from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from spectrafm_hf.checkpoints import load_checkpoint, save_checkpoint
from spectrafm_hf.data import spectrum_features
from spectrafm_hf.data.streaming import load_streamed
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.synthesis.bases import fill_completion, make_rung
from spectrafm_hf.synthesis.synthetic import SyntheticStars
from spectrafm_hf.training.collator import SpectraFMCollator
from spectrafm_hf.training.draws import Columns, Draws
from spectrafm_hf.training.optimization import Muon, MuonWithAdamW
from spectrafm_hf.training.preparation import prepare_checkpoint
from spectrafm_hf.training.recipe import Recipe, calibrated_stars, last_checkpoint, load_stars
from spectrafm_hf.training.trainer import set_up, train


PIXELS = np.linspace(4000, 4780, 40, dtype=np.float32)


def make_flux(position: np.ndarray, teff: np.ndarray, fe_h: np.ndarray) -> np.ndarray:
    """Spectra (stars, pixels) at `position` (Angstrom) whose slope is Teff and whose line is [Fe/H]."""
    line = np.exp(-0.5 * ((position - 4400) / 40) ** 2)
    return 1 + (teff[:, None] - 5000) / 4000 * (position - 4390) / 390 - 0.2 * (fe_h[:, None] + 1.2) * line


def make_stars(n_stars: int, seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    teff, fe_h = generator.uniform(4000, 6000, n_stars), generator.uniform(-1, 0.5, n_stars)
    flux = make_flux(PIXELS, teff, fe_h)
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


def save_untrained(folder: Path, stars: Dataset, **settings) -> str:
    """A checkpoint on evidence of these stars that knows two labels and has learnt none."""
    generator = np.random.default_rng(0)
    step, edge = 1e-3, np.log(3990.0)
    position = np.exp(edge - 40 * step + step * np.arange(270))
    spectra = make_flux(position, generator.uniform(4000, 6000, 300), generator.uniform(-1, 0.5, 300))
    rung = make_rung(
        spectra, [], first_interval=0, edge=edge, width=0.0625, n_intervals=3, start=np.log(position[0]), step=step,
        resolving_power=110.0, lowest_resolving_power=0.0, n_directions=4,
    )  # fmt: skip
    basis = SpectrumBasis([rung])
    torch.manual_seed(0)
    small = {"num_members": 2, "hidden_size": 32, "encoder_ffn_dim": [32]}
    config = SpectraFMConfig(
        token_embedding="basis",
        num_intervals=3,
        num_coefficients=basis.n_coefficients,
        rung_intervals=[[0, 3]],
        rung_components=[8],
        label_names=["teff", "fe_h"],
        label_units=["K", "dex"],
        label_centers=[5000.0, -0.25],
        label_scales=[740.0, 0.56],
        **{**small, **settings},
    )
    model, tokenizer = SpectraFMForPrediction(config), SpectraFMTokenizer(config.label_names, basis=basis)
    evidence = tokenizer(stars.with_format("numpy")[:])
    whole = (evidence[name].numpy() for name in ("coefficients", "reliability"))
    fill_completion(model.model.rungs[0].completion, *whole)
    save_checkpoint(model, tokenizer, folder)
    TrainingRange({"teff": (4990.0, 5010.0), "fe_h": (-0.3, -0.2)}, [rung.range]).save(folder)
    return str(folder)


def recipe_from(checkpoint: str, **changes) -> Recipe:
    settings = {
        "labels": ["teff", "fe_h"],
        "units": ["K", "dex"],
        "checkpoint": checkpoint,
        "noise": 0.5,
        "muon_learning_rate": 2e-2,
        "ema_decay": 0.9,
    }
    return Recipe(**{**settings, **changes})


def recipe_from_nothing(**changes) -> Recipe:
    """For a small model of the published architecture."""
    model = {
        "hidden_size": 32,
        "encoder_attention_heads": [2],
        "encoder_ffn_dim": [32],
        "decoder_attention_heads": [2],
        "decoder_ffn_dim": [32],
        "readout_dims": [32],
        "dropout": 0.05,
        "initializer_range": 0.05,
    }
    settings = {"labels": ["teff", "fe_h"], "units": ["K", "dex"], "model": model, "noise": 0.5, "ema_decay": 0.9}
    return Recipe(**{**settings, **changes})


@pytest.fixture(scope="module")
def make_recipe(stars, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained") / "checkpoint"
    return partial(recipe_from, save_untrained(folder, stars["train"]))


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
def trained(stars, make_recipe, tmp_path_factory):
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
        values = model.eval()(**tokenizer(rows)).predictions.numpy()
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
    factors = trainer.model.config.rung_error_factors[0]
    metrics = trainer.evaluate()
    for name in ("teff", "fe_h"):
        assert factors[name] != 1.0
        assert metrics[f"eval_{name}_robust_z"] == pytest.approx(1.0, abs=0.02)


def test_a_resumed_run_ends_with_the_loss_and_weights_of_an_uninterrupted_one(trained, stars, make_recipe, tmp_path):
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


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_one(stars, make_recipe, tmp_path):
    recipe = make_recipe(pixel_dropout=0.1, error_dropout=0.5, tilt=0.05)
    settings = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2, "eval_strategy": "no"}
    whole = train(recipe, make_arguments(tmp_path / "a", **settings), stars["train"], stars["validation"])
    for step in (5, 10):  # epochs have 8 steps
        checkpoint = str(tmp_path / "a" / f"checkpoint-{step}")
        args = make_arguments(tmp_path / f"b{step}", resume_from_checkpoint=checkpoint, **settings)
        resumed = train(recipe, args, stars["train"], stars["validation"])
        assert losses_of(resumed) == losses_of(whole) and len(losses_of(whole)) == 16
        for name, parameter in whole.model.state_dict().items():
            assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def test_each_draw_has_its_number_and_each_epoch_its_order():
    draws = Draws(10, batch_size=4)
    first = list(draws)
    draws.set_epoch(2)
    third = list(draws)
    assert first == list(range(10)) and third == list(range(24, 34)), "from a multiple of the batch size"
    stars = Columns({"teff": np.arange(10.0)}, draws.epoch_length, seed=3)
    orders = [list(stars.__getitems__(epoch)["teff"]) for epoch in (first, third, first)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] == orders[2] != orders[1] != list(range(10)) != orders[0]
    assert list(stars.__getitems__(third[3:5])["teff"]) == orders[1][3:5]
    np.testing.assert_array_equal(stars.__getitems__(third)["draw"], third)
    np.testing.assert_array_equal(Columns({"teff": np.arange(10.0)}).__getitems__([3, 1])["teff"], [3, 1])


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(trained, tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (8, 16, 64):
        shutil.copytree(trained[1] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-64"
    state = tmp_path / "checkpoint-64" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-16"
    (tmp_path / "checkpoint-16" / "trainer_state.json").unlink()
    shutil.copytree(trained[1] / "checkpoint-8", tmp_path / "checkpoint-8-backup")  # a person's
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-8"


def test_half_the_batch_accumulated_twice_is_the_whole_batch(stars, make_recipe, tmp_path):
    recipe = make_recipe(labels=["teff"], units=["K"], noise=0.0)
    settings = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no"}
    runs = [
        train(recipe, make_arguments(tmp_path / str(size), **settings, **batch), stars["train"], stars["validation"])
        for size, batch in (
            (64, {"per_device_train_batch_size": 64}),
            (32, {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2}),
        )
    ]
    assert len(losses_of(runs[0])) == 8 and np.ptp(losses_of(runs[0])) > 0.02
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-5, abs=1e-6)


def test_with_the_plain_trainer_half_the_batch_twice_is_the_whole_batch_with_missing_labels(
    stars, make_recipe, tmp_path
):
    ends = []
    for number, (size, parts) in enumerate(((64, 1), (32, 2))):
        model, tokenizer = load_checkpoint(make_recipe().checkpoint)
        arguments = make_arguments(
            tmp_path / str(number), per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=3,
            optim="sgd", learning_rate=0.1, eval_strategy="no", save_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        arguments.label_names = ["labels", "label_errors"]
        data = stars["train"].map(lambda row, i: {"fe_h": row["fe_h"] if i % 64 < 40 else np.nan}, with_indices=True)
        trainer = Trainer(model, arguments, SpectraFMCollator(tokenizer, ["teff", "fe_h"]), data)
        trainer.train()
        ends.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    start = dict(load_checkpoint(make_recipe().checkpoint)[0].named_parameters())
    moved = max((ends[0][name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-3
    for name, one in ends[0].items():
        torch.testing.assert_close(ends[1][name], one, rtol=0, atol=1e-3 * moved)


def test_a_collator_without_augmentation_leaves_the_global_generator_alone(stars, make_recipe):
    _, tokenizer = load_checkpoint(make_recipe().checkpoint)
    rows = [stars["train"][i] for i in range(4)]
    for noise in (0.0, 0.5):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        SpectraFMCollator(tokenizer, ["teff"], noise=noise)(rows)
        assert torch.equal(before, torch.get_rng_state()) == (noise == 0.0)


def test_gradients_are_clipped_before_either_optimizer_sees_them(stars, make_recipe, tmp_path, monkeypatch):
    norms = []
    step = MuonWithAdamW.step

    def measured_step(self, closure=None):
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))
        return step(self, closure)

    monkeypatch.setattr(MuonWithAdamW, "step", measured_step)
    arguments = make_arguments(tmp_path, max_steps=3, max_grad_norm=0.01, eval_strategy="no", save_strategy="no")
    trainer = train(make_recipe(), arguments, stars["train"], stars["validation"])
    before = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(before) > 0.1 and norms == pytest.approx([0.01] * 3, rel=1e-3)


@pytest.mark.slow
def test_the_running_mean_of_the_best_evaluation_is_saved(stars, make_recipe, tmp_path):
    # So large a rate that the evaluations go up and down.
    recipe = make_recipe(muon_learning_rate=0.2, early_stopping_patience=1)
    arguments = make_arguments(
        tmp_path, learning_rate=0.05, num_train_epochs=30, load_best_model_at_end=True, lr_scheduler_type="constant"
    )
    validation = {"a": stars["validation"], "b": stars["train"].select(range(100)).with_format("numpy")[:]}
    trainer = train(recipe, arguments, stars["train"], validation)
    logged = {e["epoch"]: e for e in trainer.state.log_history if "eval_a_loss" in e}
    scores = [
        np.mean(
            [e[f"eval_{name}_loss"] for e in trainer.state.log_history if f"eval_{name}_loss" in e and e["epoch"] == k]
        )
        for name in "ab"
        for k in logged
    ]
    scores = np.mean(np.reshape(scores, (2, -1)), axis=0)
    best = int(np.argmin(scores))
    assert trainer.state.best_metric == pytest.approx(scores[best])
    assert len(scores) == best + 2 < 30, "stopped after one that was not better"
    assert trainer.state.best_global_step == 8 * (best + 1)
    trainer.model.config.rung_error_factors = []
    again = trainer.evaluate(trainer.eval_dataset["a"])
    assert again["eval_loss"] == pytest.approx(logged[best + 1]["eval_a_loss"], rel=1e-5)


def test_frozen_parts_stay_as_they_are_and_the_rest_moves(trained, stars, tmp_path):
    recipe = recipe_from(str(trained[1] / "final"), freeze=["rungs.0"])
    arguments = make_arguments(tmp_path, max_steps=3, eval_strategy="no", save_strategy="no")
    before = load_checkpoint(recipe.checkpoint)[0].state_dict()
    after = train(recipe, arguments, stars["train"], stars["validation"]).model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("model.rungs.0.")} and len(same) > 5


def test_a_label_that_a_checkpoint_lacks_is_added_as_the_data_have_it(trained, stars, tmp_path):
    recipe = recipe_from(str(trained[1] / "final"), labels=["twice"], units=["dex"])
    data = {name: split.map(lambda row: {"twice": 2 * row["fe_h"] + 3}) for name, split in stars.items()}
    trainer = train(recipe, make_arguments(tmp_path, num_train_epochs=4), data["train"], data["validation"])
    model, tokenizer = load_checkpoint(str(tmp_path / "final"))
    assert tokenizer.label_names == model.config.label_names == ["teff", "fe_h", "twice"]
    assert model.config.label_units[2] == "dex"
    old = trained[0].model.config
    assert model.config.label_centers[:2] == old.label_centers
    fe_h = [value for value in stars["train"]["fe_h"] if not np.isnan(value)]
    assert model.config.label_centers[2] == pytest.approx(2 * np.median(fe_h) + 3)
    factors = model.config.rung_error_factors[0]
    assert factors["twice"] != 1 and factors["fe_h"] == old.rung_error_factors[0]["fe_h"]
    logged = [entry for entry in trainer.state.log_history if "eval_twice_rmse" in entry]
    assert logged[-1]["eval_twice_rmse"] < 0.6  # of a spread of 0.87
    training_range = TrainingRange.load(tmp_path / "final")
    assert training_range.labels.keys() == {"teff", "fe_h", "twice"} and training_range.labels["twice"][0] < 1.1


def test_scalars_of_a_recipe_are_inputs_and_nan_is_unknown(stars, tmp_path):
    coloured = {
        split: data.add_column("bp_rp", np.where(np.arange(len(data)) % 4 == 0, np.nan, data["teff"][:]) / 5000)
        for split, data in stars.items()
    }
    recipe, arguments = recipe_from_nothing(scalars=["bp_rp"]), make_arguments(tmp_path, max_steps=3)
    task = set_up(recipe, arguments, coloured["train"], coloured["validation"])
    for collator in (task.train_collator, task.collator):
        batch = collator(coloured["train"].with_format("numpy")[:8])
        assert batch["scalar_ids"].tolist() == [[0], [4], [4], [4]] * 2 and batch["request_ids"].shape == (8, 2)
    start = task.model.model.embeddings.value_embedding.weight.weight[4].clone()
    train(recipe, arguments, coloured["train"], coloured["validation"])
    model, tokenizer = load_checkpoint(str(tmp_path / "final"))
    assert not torch.equal(model.model.embeddings.value_embedding.weight.weight[4], start)
    rows = coloured["validation"].with_format("numpy")[:8]
    spectra = (rows["wavelength"], rows["flux"], rows["flux_error"])
    with torch.no_grad():
        found = model(**tokenizer(*spectra, scalars={"bp_rp": rows["bp_rp"]})).predictions
        without = model(**tokenizer(*spectra)).predictions
    same = torch.isclose(found, without, rtol=1e-5, atol=1e-5).all(dim=1)
    assert same.tolist() == [True, False, False, False] * 2


def test_a_recipe_changes_dropout_and_requests_of_a_checkpoint_and_nothing_else_of_it(trained, stars):
    rows, folder = stars["train"].with_format("numpy")[:], str(trained[1] / "final")
    changes = {"model": {"dropout": 0.5}, "tokenizer": {"requests": ["fe_h"]}}
    model, tokenizer, _ = prepare_checkpoint(recipe_from(folder, **changes), [rows])
    assert tokenizer.requests == ["fe_h"] and model.config.dropout == 0.5
    model.train()
    inputs = tokenizer(rows["wavelength"][:4], rows["flux"][:4], rows["flux_error"][:4])
    answers = {model(**inputs).predictions[0, 0].item() for _ in range(4)}
    assert len(answers) == 4
    for wrong in ({"model": {"hidden_size": 4}}, {"tokenizer": {"clip": 3.0}}):
        with pytest.raises(ValueError, match="expected only .* with a checkpoint, got"):
            prepare_checkpoint(recipe_from(folder, **wrong), [rows])


def test_calibrated_stars_are_a_source_and_not_a_validation_set(tmp_path, monkeypatch):
    stars = SyntheticStars("gaia-xp").draw(30, np.random.default_rng(0))
    names = ["wavelength", "flux", "flux_error", "mask", "teff", "logg", "fe_h", "alpha_m", "ak_targ"]
    data = Dataset.from_dict({name: list(stars[name]) for name in names})
    DatasetDict(train=data, validation=data).save_to_disk(tmp_path)
    monkeypatch.setattr("spectrafm_hf.training.recipe._hosted", lambda name: {"gaia-xp": str(tmp_path)}[name])
    monkeypatch.setattr("spectrafm_hf.training.recipe.load_dataset", load_from_disk)
    mixture, validation = load_stars(Recipe(sources={"gaia-xp": 0, "calibrated-gaia-xp": 1}), seed=0)
    assert list(validation) == ["gaia-xp"]
    drawn = mixture.__getitems__(list(range(64)))
    assert drawn["flux"].shape == (64, stars["flux"].shape[1]) and np.isfinite(drawn["alpha_m"]).all()
    assert not set(drawn["teff"]) & set(stars["teff"]), "stars of their own"
    low, high = stars["teff"].min(), stars["teff"].max()
    assert low - 300 < drawn["teff"].min() < drawn["teff"].max() < high + 300
    with pytest.raises(ValueError, match="sources: expected the columns .* got no {'ak_targ'}"):
        calibrated_stars("gaia-xp", data.remove_columns("ak_targ"))


def test_of_a_stream_as_many_stars_are_measured_as_the_memory_holds(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("spectrafm_hf.training.trainer.MEASURED_PIXELS", 50 * PIXELS.size + 1)
    stars = make_stars(100, 1)
    stars = stars.select(np.argsort(stars["teff"]))
    for split in ("train", "validation"):
        stars.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    task = set_up(make_recipe(), make_arguments(tmp_path), *load_streamed(str(tmp_path), "train", "validation", 0, 0))
    assert task.training_range.labels["teff"] == (pytest.approx(stars["teff"][0]), pytest.approx(stars["teff"][49]))


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 6)])
def test_muon_is_that_of_torch_but_for_its_rounding(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    ends = []
    for make in (
        lambda p: Muon([{"params": [p], "lr": 0.1, "weight_decay": 0.1}]),
        lambda p: torch.optim.Muon([p], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make(parameter)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[1].norm()


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


def test_the_training_script_runs_a_recipe_of_yaml_with_options(stars, make_recipe, tmp_path, monkeypatch, run_script):
    for split, data in stars.items():
        (tmp_path / "data" / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(tmp_path / "data" / "data" / f"{split}-00000-of-00001.parquet")
    assert load_dataset(str(tmp_path / "data")).keys() == stars.keys()
    recipe = {**vars(make_recipe()), "data": str(tmp_path / "data")}
    arguments = {"per_device_train_batch_size": 64, "num_train_epochs": 1, "report_to": "none", "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **arguments, "output_dir": "elsewhere"}))
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_script("train.py", "recipe.yaml", "--output_dir", "out", "--max_steps", 3)
    assert code == 0, errors
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()
    with (tmp_path / "out" / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert curves[-1]["step"] == "3" and float(curves[-1]["train_loss"]) > 0
