"""Fine-tuning by others: what is joined, dropped, split and trained, and that what comes out is what it says."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard

from spectrafm_hf import finetuning
from spectrafm_hf.checkpoints import load_checkpoint, save_checkpoint
from spectrafm_hf.data import spectrum_features
from spectrafm_hf.data.building import spectra_table
from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.finetuning import (
    finetune,
    join,
    join_columns,
    read_label_table,
    split_stars,
    training_settings,
)
from spectrafm_hf.prediction import TrainingRange


GRID = np.linspace(4000, 4780, 40)


@pytest.fixture(autouse=True)
def short_baseline(monkeypatch):
    """The MLP that one compares with is trained for a moment: nothing here is about how good it is."""
    monkeypatch.setattr(finetuning, "MLP_STEPS", 20)


def make_rows(n_spectra: int, visits: int = 1, grid: np.ndarray = GRID, seed: int = 0) -> list[dict]:
    """Spectra whose slope is Teff and whose line is the age; each star has several visits."""
    generator = np.random.default_rng(seed)
    teff, age = generator.uniform(4000, 6000, n_spectra), generator.uniform(1, 12, n_spectra)
    rows = []
    for i in range(n_spectra):
        star = i // visits
        x = (grid - grid.mean()) / np.ptp(grid)
        flux = 1 + (teff[star] - 5000) / 2000 * x - 0.04 * age[star] * np.exp(-0.5 * (x / 0.08) ** 2)
        rows.append(
            {
                "object_id": f"star {star}",
                "survey": "test",
                "wavelength": grid.astype(np.float32),
                "flux": (flux + 0.01 * generator.standard_normal(grid.size)).astype(np.float32),
                "flux_error": np.full(grid.size, 0.01, np.float32),
                "mask": np.zeros(grid.size, bool),
                "snr": 100.0,
                "teff": teff[star],
                "age": age[star],
            }
        )
    return rows


def write_spectra(path: Path, rows: list[dict]) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(spectra_table(rows, spectrum_features([])), path)
    return [path]


def write_labels(path: Path, rows: list[dict], heading: str = "object_id,teff,age[Gyr],age_err") -> Path:
    lines = dict.fromkeys(f"{row['object_id']},{row['teff']},{row['age']},0.2" for row in rows)
    path.write_text("\n".join([heading, *lines]) + "\n")
    return path


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    """A tiny checkpoint that knows nothing of the age."""
    folder = tmp_path / "base"
    save_checkpoint(tiny_model, tiny_tokenizer, folder)
    TrainingRange({"teff": (3500.0, 7000.0)}, (4000.0, 4780.0), (20.0, 20.0)).save(folder)
    return folder


def tune(tmp_path: Path, checkpoint: Path, rows: list[dict], **options):
    files = write_spectra(tmp_path / "in" / "spectra.parquet", rows)
    labels = options.pop("labels", None) or write_labels(tmp_path / "labels.csv", rows)
    settings = {"model": str(checkpoint), "steps": 20, "batch_size": 8} | options
    return finetune(files, labels, tmp_path / "mine", **settings)


# -------------------------------------------------------------------------------------------------------------- labels


def test_units_stand_in_headings_and_capitals_stay(tmp_path):
    (tmp_path / "a.csv").write_text(
        "object_id,[Fe/H],age [Gyr],age_err,ra\nx,-0.1,4,0.2,10\ny,0.1,5,-1,11\nz,0.2,-9999,1,12\n"
    )
    labels = read_label_table(tmp_path / "a.csv")
    assert labels.units == {"fe_h": "dex", "age": "Gyr"}
    assert np.isnan(labels.values["age"]).tolist() == [False, False, True]
    assert np.isnan(labels.values["age_err"]).tolist() == [False, True, False]
    assert [note.split(":")[0] for note in labels.notes] == [
        "columns of numbers that are not learnt (--label names those that are)",
        "age",
        "age_err",
    ]
    assert read_label_table(tmp_path / "a.csv", ["age"], {"age": "yr"}).units == {"age": "yr"}


@pytest.mark.parametrize(
    ("columns", "learnt"),
    [
        ("source_id,ak_targ", {"ak_targ": ""}),  # what else could be meant
        ("source_id,ra,vsini[km/s],e_vsini", {"vsini": "km/s"}),
        ("source_id,ra,age,j", {"age": ""}),
        ("source_id,teff,age,age_err", {"teff": "K", "age": ""}),
    ],
)
def test_the_labels_to_learn_are_seen_from_the_table(tmp_path, columns, learnt):
    (tmp_path / "a.csv").write_text(f"{columns}\n" + ",".join(["1"] * (columns.count(",") + 1)) + "\n")
    assert read_label_table(tmp_path / "a.csv").units == learnt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["mass"]}, r"labels: expected columns of numbers in a.csv \(age, empty, teff\), got mass"),
        ({"names": ["empty"]}, "empty: expected values in this column of a.csv, got none in 2 rows"),
        ({"names": ["age"], "units": {"teff": "K"}}, "units: expected units of labels to learn"),
        ({"names": ["teff"], "units": {"teff": "eV"}, "known": {"teff": "K"}}, "teff: expected K, the unit of the"),
    ],
)
def test_a_label_that_cannot_be_learnt_is_told(tmp_path, options, message):
    (tmp_path / "a.csv").write_text("object_id,age,empty,teff\nx,1,-9999,4000\ny,2,-9999,5000\n")
    with pytest.raises(ValueError, match=message):
        read_label_table(tmp_path / "a.csv", **options)


def test_labels_are_joined_by_file_where_that_fits(tmp_path):
    (tmp_path / "a.csv").write_text(
        "file,apogee_id,age[Gyr]\nspectra/one.fits,A,1\ntwo,A,2\ntwo,A,2\nthree,B,1\nthree,B,9\n"
    )
    labels = read_label_table(tmp_path / "a.csv")
    names = ["one", "two", "three", "four"]
    rows, stars, how = join(labels, names, [f"other/{name}.fits" for name in names])
    assert rows.tolist() == [0, 1, -2, -1]  # what the table says twice and differently is not believed
    assert stars == ["A", "A", "three", "four"] and how == "file = column file"


# --------------------------------------------------------------------------------------------------------------- split


def test_no_star_is_in_two_splits_whatever_the_order():
    stars = [f"star {i // 3}" for i in range(900)]
    splits = split_stars(stars)
    assert all(len(set(splits[3 * i : 3 * i + 3])) == 1 for i in range(300))
    assert [int((splits == name).sum()) for name in ("train", "validation", "test")] == [540, 180, 180]
    assert np.array_equal(split_stars(stars[::-1])[::-1], splits)


def test_more_stars_train_more_and_longer():
    few, many = (training_settings(n, "all")[1] for n in (30, 40_000))
    assert few["max_steps"] < many["max_steps"]
    assert few["per_device_train_batch_size"] < many["per_device_train_batch_size"]
    # An instrument that the checkpoint has never seen takes more.
    new = training_settings(30, "all", new_instrument=True)[1]
    assert new["max_steps"] > few["max_steps"] and new["learning_rate"] > few["learning_rate"]
    assert training_settings(30, "all", new_instrument=True, steps=7)[1]["max_steps"] == 7
    with pytest.raises(ValueError, match="train: expected one of all, frozen, lora, head, got 'half'"):
        training_settings(30, "half")


# ------------------------------------------------------------------------------------------------------------- the run


@pytest.mark.slow
def test_a_new_label_is_learnt_evaluated_and_told_of(tmp_path, checkpoint):
    rows = make_rows(120, visits=2)
    labels = write_labels(tmp_path / "labels.csv", rows[:110])
    said: list[str] = []
    tuned = tune(
        tmp_path, checkpoint, rows, labels=labels, what="all", say=said.append, command="spectrafm finetune ..."
    )
    out = tuned.folder
    assert tuned.sizes == {"train": 66, "validation": 22, "test": 22}
    assert tuned.dropped == {"no row in the table of labels": 10}
    assert any("dropped 10 spectra" in line for line in said)
    with (out / "report" / "dropped.csv").open() as file:
        assert {line["object_id"] for line in csv.DictReader(file)} == {f"star {i}" for i in range(55, 60)}
    model, tokenizer = load_checkpoint(out)
    assert list(tokenizer.requests) == ["teff", "age"]
    assert dict(zip(model.config.label_names, model.config.label_units, strict=True))["age"] == "Gyr"
    low, high = TrainingRange.load(out).labels["age"]
    assert low < 3 and high > 10
    results = json.loads((out / "evaluation.json").read_text())[0]["results"]["all stars"]
    assert set(results) == {"fine-tuned", "base, as it was", "ridge", "PCA + MLP"}
    assert set(results["base, as it was"]) == {"teff"}
    assert results["ridge"]["age"]["n"] == 22 and results["ridge"]["age"]["robust_scatter"] < 1.0
    with (out / "report" / "predictions.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["model"] == "fine-tuned"]
    star = next(row for row in rows if row["object_id"] == lines[0]["object_id"])
    assert float(lines[0]["given_age"]) == pytest.approx(star["age"], rel=1e-4)
    card = (out / "README.md").read_text()
    assert {"license", "datasets"}.isdisjoint(ModelCard(card).data.to_dict()), "nobody has stated them"
    assert "spectrafm finetune ..." in card and "age [Gyr]" in card
    for picture in ("predicted.png", "loss.png"):
        assert (out / picture).stat().st_size > 10_000

    # The same again changes nothing; another wish is refused, unless it is to begin again.
    weights = (out / "model.safetensors").read_bytes()
    again = tune(tmp_path, checkpoint, rows, labels=labels, what="all")
    assert again.evaluation == tuned.evaluation and (out / "model.safetensors").read_bytes() == weights
    with pytest.raises(
        ValueError, match=r"out: expected a fine-tuning with seed=1 in .*, got 0; overwrite begins again"
    ):
        tune(tmp_path, checkpoint, rows, labels=labels, what="all", seed=1)

    # Other spectra are others, though their file be of the same size; without compression, it is.
    file = tmp_path / "in" / "spectra.parquet"
    before = file.stat().st_size
    rows[0]["flux"] = rows[0]["flux"][::-1].copy()
    with pytest.raises(ValueError, match=r"out: expected a fine-tuning with spectra="):
        tune(tmp_path, checkpoint, rows, labels=labels, what="all")
    assert file.stat().st_size == before


@pytest.mark.slow
def test_where_training_only_does_harm_the_start_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(finetuning.LEARNING_RATES, "all", 0.1)
    stars = Path(finetuning.__file__).parent / "resources" / "gaia_xp_demo.parquet"  # with labels
    base, said = "spectrafm-gaia-xp-small", []
    tuned = finetune(
        [stars], stars, tmp_path / "mine", model=base, names=["teff"], what="all", steps=4, say=said.append
    )
    assert any(line.startswith("No step was better on the validation spectra than the start") for line in said)
    weights = [load_checkpoint(path)[0].state_dict() for path in (base, tuned.folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    results = tuned.evaluation["results"]["all stars"]
    assert results["fine-tuned"]["teff"]["rmse"] == results[f"{base}, as it was"]["teff"]["rmse"]
    assert "its weights are kept" in (tuned.folder / "README.md").read_text()


@pytest.mark.slow
def test_training_ends_when_the_time_is_over(tmp_path, checkpoint):
    said: list[str] = []
    tuned = tune(tmp_path, checkpoint, make_rows(40), names=["teff"], minutes=0.0, say=said.append)
    assert "0 minutes are over: training ends after 1 steps" in said
    assert np.isfinite(tuned.evaluation["results"]["all stars"]["fine-tuned"]["teff"]["rmse"])


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_to_the_same_end(tmp_path, checkpoint, monkeypatch):
    rows = make_rows(40)
    first = tune(tmp_path / "a", checkpoint, rows, what="head")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(finetuning, "_evaluate", stop)
        tune(tmp_path / "b", checkpoint, rows, what="head")
    run = tmp_path / "b" / "mine" / "work" / "run"
    # As if it had been killed in training: what it saved last is there, the end is not.
    shutil.rmtree(run / "final")
    (run / "curves.csv").unlink()
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    second = tune(tmp_path / "b", checkpoint, rows, what="head")
    weights = [(tuned.folder / "model.safetensors").read_bytes() for tuned in (first, second)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_an_instrument_that_is_new_is_measured_anew(tmp_path):
    """Half within the wavelengths of the checkpoint, finer, and each star on a grid of its own."""
    rows = [
        row
        for i in range(40)
        for row in make_rows(i + 1, grid=np.linspace(9800, 11000, 60) * (1 + 1e-5 * i), seed=5)[-1:]
    ]
    tuned = tune(tmp_path, "spectrafm-gaia-xp-small", rows, names=["age"], steps=3)  # type: ignore[arg-type]
    assert tuned.what == "all"
    _, tokenizer = load_checkpoint(tuned.folder)
    table = np.asarray(tokenizer.standardize_wavelength)
    assert table.min() < 3400 and 9700 < table[table > 9750].min() < 9850 and table.max() > 10_950
    assert (np.diff(table) > 0).all()
    low, high = TrainingRange.load(tuned.folder).wavelength
    assert 9790 < low < 9820 and 10_950 < high < 11_010


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("few", "stars: expected at least 20 with a spectrum and a label, got 12"),
        (
            "none",
            r"labels: expected identifiers of the spectra \(star 0, star 1, star 2, ...\) in the column object_id, got",
        ),
        ("constant", "age: expected values that differ, got 5 for most of the training spectra"),
        ("elsewhere", "out: expected a new folder, or a fine-tuning to go on with, got other files in"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(tmp_path, checkpoint, change, message):
    rows = make_rows(12 if change == "few" else 40)
    given = [dict(row) for row in rows]
    for row in given:
        if change == "none":
            row["object_id"] = row["object_id"].replace("star", "object")
        if change == "constant":
            row["age"] = 5
    if change == "elsewhere":
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=message):
        tune(tmp_path, checkpoint, rows, labels=write_labels(tmp_path / "labels.csv", given))


@pytest.mark.slow
def test_spectra_without_errors_train_too(tmp_path, checkpoint):
    rows = make_rows(40)
    for row in rows:
        row["flux_error"] = np.full(GRID.size, np.nan, np.float32)
    tuned = tune(tmp_path, checkpoint, rows, what="head", steps=2)
    assert np.isfinite(tuned.evaluation["results"]["all stars"]["fine-tuned"]["age"]["rmse"])


def test_the_table_has_to_name_the_spectra(tmp_path):
    labels = read_label_table(write_labels(tmp_path / "a.csv", make_rows(3), "who,teff,age[Gyr],age_err"))
    expected = "id_column: expected one of object_id, .* among the columns of the labels, got who, "
    with pytest.raises(ValueError, match=expected):
        join_columns(labels.table)
    assert join_columns(labels.table, "Who") == ["who"]


def test_the_spectra_that_are_written_are_those_that_were_read(tmp_path):
    files = write_spectra(tmp_path / "x.parquet", make_rows(3))
    assert [row["object_id"] for row in read_spectra(find_files(files))] == ["star 0", "star 1", "star 2"]
