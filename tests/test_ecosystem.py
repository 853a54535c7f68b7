"""Use with other libraries: pipelines over data sets, the Trainer, custom loops.

No class of this project is subclassed here, and no helper of its training is used but the collator and the metrics.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import datasets
import numpy as np
import pytest
import torch
from conftest import make_tiny_evidence, make_tiny_model
from hub_server import serve
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import spectrafm_hf
from spectrafm_hf import SpectraFMTokenizer, bundled, load_checkpoint, save_checkpoint
from spectrafm_hf.checkpoints import BASE_CHECKPOINT
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.inference.prediction import predict_batches
from spectrafm_hf.training.calibration import make_compute_metrics
from spectrafm_hf.training.collator import SpectraFMCollator


COLUMNS = ("wavelength", "flux", "flux_error", "mask")
LABELS = ["teff", "logg"]


# ------------------------------------------------------------------------------------------- pipelines, map, streams


@pytest.fixture(scope="module")
def demo() -> datasets.Dataset:
    """Observed stars; every third lacks the red end, so that numbers of pixels and of tokens differ."""
    rows = []
    for i, row in enumerate(read_spectra([Path(spectrafm_hf.__file__).parent / "resources" / "gaia_xp_demo.parquet"])):
        pixels = slice(0, 150 if i % 3 == 1 else 343)
        rows.append({"object_id": row["object_id"], **{name: row[name][pixels] for name in COLUMNS}})
    return datasets.Dataset.from_list(rows[:20])


@pytest.fixture(scope="module")
def expected(demo) -> list[dict]:
    """What `spectrafm predict` finds."""
    model, tokenizer = load_checkpoint(BASE_CHECKPOINT)
    [batch] = predict_batches(model, tokenizer, [list(demo.with_format("numpy"))])
    columns = {name: values.tolist() for name, values in batch.items() if name not in ("flags", "reason")}
    return [dict(zip(columns, star, strict=True)) for star in zip(*columns.values(), strict=True)]


def check_teff(found, expected):
    """Other stars beside it change the rounding of a star: well below its error."""
    for value, star in zip(found, expected, strict=True):
        assert value == pytest.approx(star["teff"], abs=1e-2 * star["teff_err"])


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


FORMS = {
    "data set": lambda data: data,
    "in torch format": lambda data: data.with_format("torch"),
    "stream": lambda data: data.to_iterable_dataset(num_shards=2),
    "mapped stream": lambda data: data.to_iterable_dataset().map(lambda row: {**row, "flux": row["flux"]}),
    "generator": lambda data: (row for row in data),
    "list": list,
    "torch Dataset": Rows,
    "torch IterableDataset": Stream,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pipeline_answers_any_form_of_data_in_batches_as_predict_does(form, demo, expected):
    predict = pipeline("stellar-labels", model=bundled(BASE_CHECKPOINT), device="cpu")
    for batch_size in (1, 7):
        answers = list(predict(FORMS[form](demo), batch_size=batch_size))
        assert [star["object_id"] for star in answers] == [star["object_id"] for star in expected]
        for answer, star in zip(answers, expected, strict=True):
            # Labels that the spectra of Gaia XP do not give are NaN in a table, and absent here.
            assert list(answer) == [name for name, value in star.items() if value == value]
            for name in ("teff", "logg", "fe_h", "alpha_m"):
                error = star[f"{name}_err"]
                assert answer[name] == pytest.approx(star[name], abs=1e-2 * error)
                assert answer[f"{name}_err"] == pytest.approx(error, rel=1e-2)


def test_a_pipeline_reads_one_column_of_a_data_set_and_tokenizes_in_processes_of_its_own(demo, expected):
    predict = pipeline("stellar-labels", model=bundled(BASE_CHECKPOINT), device="cpu")
    spectra = [{"spectrum": {name: row[name] for name in COLUMNS}} for row in demo]
    nested = datasets.Dataset.from_list(spectra)
    for workers in (0, 2):
        answers = list(predict(KeyDataset(nested, "spectrum"), batch_size=4, num_workers=workers))
        check_teff([star["teff"] for star in answers], expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_tokenizer_maps_a_data_set_in_batches(streaming, demo, expected):
    model, tokenizer = load_checkpoint(BASE_CHECKPOINT)
    data = demo.to_iterable_dataset() if streaming else demo

    def tokenize(rows):
        return tokenizer(rows, return_tensors="np")

    mapped = data.map(tokenize, batched=True, batch_size=5, remove_columns=data.column_names)
    loader = DataLoader(mapped.with_format("torch"), batch_size=5, collate_fn=default_data_collator)
    with torch.no_grad():
        values = torch.cat([model(**batch).predictions for batch in loader])
    check_teff(values[:, 0].tolist(), expected)


def test_the_tokenizer_is_a_transform_of_a_data_set(demo, expected):
    model, tokenizer = load_checkpoint(BASE_CHECKPOINT)
    inputs = demo.with_transform(tokenizer)[:3]
    with torch.no_grad():
        values = model(**inputs).predictions
    check_teff(values[:, 0].tolist(), expected[:3])


@pytest.mark.parametrize("kind", ["pixels", "evidence"])
def test_a_data_set_that_is_mapped_again_comes_from_the_cache(kind, tmp_path, tiny_evidence, stars):
    """Also after the tokenizer was used for others: what it remembers of them does not make it another."""
    tokenizer = tiny_evidence[1] if kind == "evidence" else SpectraFMTokenizer(standardize_scale=0.1)
    datasets.Dataset.from_list(stars).to_parquet(str(tmp_path / "stars.parquet"))
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "stars.parquet"), cache_dir=str(tmp_path))
    calls = tmp_path / "calls"

    def tokenize(rows):
        with open(calls, "a") as file:
            file.write("x")
        return tokenizer(rows, return_tensors="np")

    mapped = [data["train"].map(tokenize, batched=True)]
    assert calls.read_text() == "x"
    tokenizer([{**star, "wavelength": star["wavelength"] * 1.0001} for star in stars])
    mapped.append(data["train"].map(tokenize, batched=True))
    assert calls.read_text() == "x"
    assert mapped[0].cache_files == mapped[1].cache_files


# ------------------------------------------------------------------------------------------------------ the Trainer


@pytest.fixture
def labelled(stars) -> datasets.Dataset:
    """Made-up stars of different lengths, with labels; one has no logg."""
    rows = [
        {**star, "survey": "made up", "teff": 4000.0 + 300.0 * i, "teff_err": 30.0, "logg": 2.0 + 0.3 * i}
        for i, star in enumerate(stars * 3)
    ]
    rows[4]["logg"] = float("nan")
    return datasets.Dataset.from_list(rows)


def make_trainer(folder: Path, data, seed: int = 0, collator=None, model=None, **arguments) -> Trainer:
    tokenizer = SpectraFMTokenizer(standardize_scale=0.1)
    model = model or make_tiny_model(seed)
    arguments = {
        "remove_unused_columns": False,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        data_collator=collator or SpectraFMCollator(tokenizer, LABELS),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(model.config, LABELS),
    )


def losses(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_plain_trainer_trains_evaluates_saves_and_resumes(streaming, labelled, tmp_path):
    data = labelled.to_iterable_dataset() if streaming else labelled
    trainer = make_trainer(tmp_path, data, load_best_model_at_end=True, metric_for_best_model="teff_rmse")
    trainer.train()
    assert len(losses(trainer)) == 4 and np.all(np.isfinite(losses(trainer)))
    assert len(losses(trainer, "eval_teff_rmse")) == len(losses(trainer, "eval_logg_robust_z")) == 2

    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make_trainer(tmp_path, data, seed=7)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(trainer)
    torch.testing.assert_close(resumed.evaluate()["eval_loss"], losses(trainer, "eval_loss")[-1], rtol=0, atol=0)

    resumed.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-4", "final"):
        model, tokenizer = load_checkpoint(tmp_path / folder)
        torch.testing.assert_close(model.state_dict(), resumed.model.state_dict(), rtol=0, atol=0)
        assert tokenizer.to_dict() == resumed.processing_class.to_dict()


@pytest.mark.parametrize("kind", ["pixels", "evidence"])
def test_a_resumed_run_with_dropout_has_the_losses_of_the_run_that_was_not_stopped(kind, labelled, tmp_path):
    def trainer(seed: int) -> Trainer:
        if kind == "pixels":
            made = make_trainer(
                tmp_path, labelled, seed, model=make_tiny_model(seed, dropout=0.3, attention_dropout=0.3)
            )
        else:
            model, tokenizer = make_tiny_evidence(dropout=0.3)
            with torch.no_grad():
                model.means[0].bias += 0.1 * seed
            made = make_trainer(tmp_path, labelled, seed, SpectraFMCollator(tokenizer, LABELS), model=model)
        return made

    whole = trainer(0)
    whole.train()
    assert len(losses(whole)) == 4 and np.all(np.isfinite(losses(whole)))
    without = make_trainer(tmp_path / "other", labelled, 0)
    without.train()
    assert losses(without) != losses(whole), "dropout has an effect"
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = trainer(7)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


def test_smoothing_of_labels_is_refused_in_one_line(labelled, tmp_path):
    trainer = make_trainer(tmp_path, labelled, label_smoothing_factor=0.1)
    with pytest.raises(KeyError, match="logits: there are none, .* label_smoothing_factor has to be 0"):
        trainer.train()


def test_the_plain_trainer_predicts_stars_with_and_without_labels(labelled, tmp_path):
    trainer = make_trainer(tmp_path, labelled)
    found = trainer.predict(labelled)
    (mean, log_variance), (truth, truth_error) = found.predictions, found.label_ids
    assert mean.shape == log_variance.shape == truth.shape == truth_error.shape == (15, 2)
    np.testing.assert_allclose(truth[:, 0], labelled["teff"])
    assert np.flatnonzero(np.isnan(truth[:, 1])).tolist() == [4]
    assert np.isfinite(found.metrics["test_loss"]) and found.metrics["test_teff_rmse"] > 0

    unlabelled = labelled.select_columns(["object_id", *COLUMNS])
    ignored = ["mean", "log_variance", "encoder_last_hidden_state"]
    found = trainer.predict(unlabelled, ignore_keys=ignored)
    assert found.label_ids is None and "test_loss" not in found.metrics
    values, errors = found.predictions
    rows = list(labelled.with_format("numpy"))
    [same] = predict_batches(trainer.model, trainer.processing_class, [rows])
    for i, name in enumerate(trainer.processing_class.label_names):
        np.testing.assert_allclose(values[:, i], same[name], rtol=1e-4)
        np.testing.assert_allclose(errors[:, i], same[f"{name}_err"], rtol=1e-4)


def test_the_metrics_refuse_outputs_that_are_not_standardised(labelled, tmp_path):
    trainer = make_trainer(tmp_path, labelled)
    metrics = trainer.predict(labelled).metrics
    # More outputs after the two are no harm.
    assert trainer.predict(labelled, ignore_keys=[]).metrics["test_teff_rmse"] == metrics["test_teff_rmse"]
    for ignored in (["mean", "log_variance", "encoder_last_hidden_state"], ["mean"], ["log_variance"]):
        with pytest.raises(ValueError, match="predictions: expected mean and log_variance, .* ignore_keys must not"):
            trainer.predict(labelled, ignore_keys=ignored)


@pytest.mark.parametrize("known_errors", [False, True])
def test_the_trainer_of_the_examples_takes_a_mapped_data_set(known_errors, stars, tmp_path):
    """With its own settings: it drops the columns that `forward` does not name, and its collator stacks the rest."""
    tokenizer = SpectraFMTokenizer(standardize_scale=0.1)
    errors = {"teff_err": 30.0} if known_errors else {}
    data = datasets.Dataset.from_list([{**star, **errors, "teff": 4000.0 + 100.0 * i} for i, star in enumerate(stars)])

    def tokenize(rows):
        return tokenizer(rows, labels=["teff"], return_tensors="np")

    data = data.map(tokenize, batched=True)  # in one batch, so that all have as many tokens
    trainer = make_trainer(tmp_path, data, collator=default_data_collator, remove_unused_columns=True)
    trainer.compute_metrics = None
    trainer.train()
    assert len(losses(trainer, "eval_loss")) == 2 and np.isfinite(losses(trainer, "eval_loss")).all()
    truth = trainer.predict(data).label_ids
    np.testing.assert_array_equal(truth[0], np.array([data["teff"]]).T)


def test_columns_that_the_trainer_drops_are_missed_by_name(labelled, tmp_path):
    trainer = make_trainer(tmp_path, labelled, remove_unused_columns=True)
    with pytest.raises(ValueError, match=r"flux_error: expected among the columns .* remove_unused_columns=False"):
        trainer.train()


# ------------------------------------------------------------------------------------------------- loops of one's own


@pytest.mark.parametrize("streaming", [False, True])
def test_a_loop_of_torch_and_one_of_accelerate_learn_the_same(streaming, labelled):
    data = labelled.to_iterable_dataset() if streaming else labelled
    tokenizer = SpectraFMTokenizer(standardize_scale=0.1)

    def train(accelerator: accelerate.Accelerator | None) -> tuple[list[float], torch.Tensor]:
        model = make_tiny_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        loader = DataLoader(data, batch_size=4, collate_fn=SpectraFMCollator(tokenizer, LABELS))
        if accelerator:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        steps, values = [], []
        for batch in loader:
            outputs = model(**batch)
            if accelerator:
                accelerator.backward(outputs.loss)
            else:
                outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(outputs.loss.item())
            values.append(accelerator.gather_for_metrics(outputs.predictions) if accelerator else outputs.predictions)
        return steps, torch.cat(values).detach()

    plain, accelerated = train(None), train(accelerate.Accelerator(cpu=True))
    assert len(plain[0]) == 4 and plain[1].shape == (15, 2)
    assert plain[0] == accelerated[0]
    torch.testing.assert_close(*(found[1] for found in (plain, accelerated)), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------- estimate-memory


@pytest.mark.slow
@pytest.mark.parametrize("name", spectrafm_hf.bundled_names("spectrafm"))
def test_accelerate_estimates_the_memory_of_a_checkpoint_on_the_hub(name, tmp_path):
    """It takes the name of a repository, of which it loads the configuration and the code, and no weights."""
    model, tokenizer = load_checkpoint(name)
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    shutil.copy(Path(bundled(name), "README.md"), tmp_path / "checkpoint")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with serve() as hub:
        hub.commit(f"somebody/{name}", tmp_path / "checkpoint")
        command = ["estimate-memory", f"somebody/{name}", "--trust_remote_code", "--dtypes", "float32", "float16"]
        run = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command],
            env={**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=200,
        )
        assert run.returncode == 0, run.stderr
        assert not any("safetensors" in answer.path for answer in hub.log)
    [found] = re.findall(r"float32\W+[\d.]+ MB\W+([\d.]+) MB\W+([\d.]+) MB", run.stdout)
    megabytes = 4 * sum(tensor.numel() for tensor in model.state_dict().values()) / 2**20
    assert float(found[0]) == pytest.approx(megabytes, abs=0.01)
    assert float(found[1]) == pytest.approx(4 * megabytes, abs=0.03)  # weights, gradients, Adam's two moments
