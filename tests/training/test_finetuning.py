"""Fine-tuning by others: what is joined and dropped, and that what comes out is what it says."""

import csv
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import pipeline

import spectrafm_hf
from spectrafm_hf.checkpoints import load_checkpoint, save_checkpoint
from spectrafm_hf.data.joining import read_data_set
from spectrafm_hf.inference.prediction import answered_labels
from spectrafm_hf.inference.states import frozen_states
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.models.configuration_spectrafm import FIRST_LABEL_ID
from spectrafm_hf.models.gate_spectrafm import SPEED_OF_LIGHT
from spectrafm_hf.show.labels import plot_given
from spectrafm_hf.synthesis.synthetic import SyntheticStars
from spectrafm_hf.training import finetuning, rivals
from spectrafm_hf.training.choices import choose_heads, make_folds
from spectrafm_hf.training.components import fit_pixels
from spectrafm_hf.training.finetuning import finetune


STARS = Path(spectrafm_hf.__file__).parent / "resources" / "gaia_xp_demo.parquet"
SHIFT = 0.85


@pytest.fixture(autouse=True)
def short_networks(monkeypatch):
    """The networks that one compares with are trained for a moment: nothing here is about how good they are."""
    monkeypatch.setattr(rivals, "MLP_STEPS", 5)


@pytest.fixture(scope="module")
def stars():
    return pq.read_table(STARS)


def write_labels(path: Path, stars: pa.Table, kept: slice = slice(0, None)) -> Path:
    """log g with another zero point, and a label that is new: 4 log Teff - log g and a constant."""
    lines = ["object_id,logg,logg_err,log_lm[dex]"]
    for star, teff, logg in zip(*(stars[name].to_pylist() for name in ("object_id", "teff", "logg")), strict=True):
        lines.append(f"{star},{logg + SHIFT},0.05,{4 * np.log10(teff) - logg - 10.61}")
    path.write_text("\n".join([lines[0], *lines[1:][kept]]) + "\n")
    return path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, stars):
    """A checkpoint with two labels, and what was said."""
    folder, messages = tmp_path_factory.mktemp("tuned"), []
    labels = write_labels(folder / "labels.csv", stars, slice(4, None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "MLP_STEPS", 5)
        made = finetune(
            [STARS], labels, folder / "mine", say=messages.append, command="spectrafm finetune ...", draw=plot_given
        )
    return made, messages, labels


def spectra_of(stars, tokenizer, requests=None):
    columns = {name: np.array(stars[name].to_pylist()) for name in ("wavelength", "flux", "flux_error", "mask")}
    return tokenizer(columns, requests=requests)


def test_labels_are_learnt_told_of_and_compared(tuned):
    made, messages, _ = tuned
    n_stars = len(pq.read_table(STARS)) - 4
    assert made.sizes == {"train": n_stars} and made.dropped == {"no row in the table of labels": 4}
    assert "new to the checkpoint: log_lm [dex]" in messages
    results = made.evaluation["results"]["all stars"]
    assert set(results) == {"fine-tuned", "spectrafm-base, as it was", *rivals.RIVALS}
    assert set(results["spectrafm-base, as it was"]) == {"logg"}
    assert results["spectrafm-base, as it was"]["logg"]["bias"] == pytest.approx(-SHIFT, abs=0.1)
    own = results["fine-tuned"]
    assert abs(own["logg"]["bias"]) < 0.05 and own["logg"]["rmse"] < 0.3
    assert own["log_lm"]["rmse"] < 0.3 and 0.6 < own["log_lm"]["robust_z"] < 1.5
    assert made.verdicts[0].startswith("logg: fine-tuned is ahead, RMSE") and made.summary().startswith("logg: ")


def test_what_is_written_is_whole(tuned):
    made, _, _ = tuned
    out = made.folder
    with (out / "report" / "dropped.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    with (out / "report" / "heads.csv").open() as file:
        weights = [(line["label"], line["head"], float(line["weight"])) for line in csv.DictReader(file)]
    for label, heads in made.heads.items():
        assert sum(weight for name, _, weight in weights if name == label) == pytest.approx(1.0)
        assert all(head in heads for name, head, weight in weights if name == label and weight > 0)
    with (out / "report" / "predictions.csv").open() as file:
        assert {line["model"] for line in csv.DictReader(file)} >= {"fine-tuned", *rivals.RIVALS}
    card = (out / "README.md").read_text()
    assert {"license", "datasets"}.isdisjoint(ModelCard(card).data.to_dict()), "nobody has stated them"
    assert "spectrafm finetune ..." in card and made.verdicts[1] in card
    assert (out / "predicted.png").stat().st_size > 10_000
    assert not (out / "work" / "checkpoint").exists()
    low, high = TrainingRange.load(out).labels["log_lm"]
    assert low < high


def test_all_other_answers_are_those_of_the_base_bit_by_bit(tuned, stars):
    made, _, _ = tuned
    (base, old), (model, new) = load_checkpoint("spectrafm-base"), load_checkpoint(made.folder)
    with torch.no_grad():
        before, after = base(**spectra_of(stars, old)), model(**spectra_of(stars, new))
    others = [i for i, name in enumerate(base.config.label_names) if name != "logg"]
    assert torch.equal(after.predictions[:, others].nan_to_num(), before.predictions[:, others].nan_to_num())
    assert torch.equal(
        after.prediction_errors[:, others].nan_to_num(), before.prediction_errors[:, others].nan_to_num()
    )
    truth = np.array(stars["logg"].to_pylist()) + SHIFT
    assert abs(np.median(after.predictions[:, 1].numpy() - truth)) < 0.05


def test_the_pipeline_and_predict_ask_for_the_new_label_too(tuned, stars):
    made, _, _ = tuned
    row = {name: np.array(stars[name][0].as_py()) for name in ("wavelength", "flux", "flux_error", "mask")}
    predict = pipeline("stellar-labels", model=str(made.folder), trust_remote_code=True)
    star = predict(row, flags=True)
    assert {"teff", "logg", "log_lm", "log_lm_err", "flags"} <= set(star) and star["log_lm_err"] > 0
    model, tokenizer = load_checkpoint(made.folder)
    assert answered_labels(model, tokenizer, row) == ["teff", "logg", "fe_h", "alpha_m", "log_lm"]
    with torch.no_grad():
        predicted = model(**spectra_of(stars, tokenizer, ["log_lm"])).predictions[0, 0]
    assert float(predicted) == pytest.approx(star["log_lm"], abs=1e-4)


def test_an_answer_beyond_the_labelled_stars_is_flagged(tuned, stars):
    made, _, _ = tuned
    predict = pipeline("stellar-labels", model=str(made.folder), trust_remote_code=True)
    rows = [
        {name: np.array(stars[name][i].as_py()) for name in ("wavelength", "flux", "flux_error", "mask")}
        for i in range(len(stars))
    ]
    config = predict.model.config
    for settings in config.corrections:
        settings["range"] = [1.0, 1.1]
    found = predict(rows, requests=["log_lm"], flags=True)
    assert all("edge" in star["flags"] for star in found if not 0.9 < star["log_lm"] < 1.2)


def test_what_was_chosen_is_what_the_checkpoint_says(stars, tmp_path):
    """Also of spectra on another grid, with holes, and after a round trip through files."""
    base, tokenizer = load_checkpoint("spectrafm-base")
    rows = Dataset(stars).with_format("numpy")
    rung, states, used, _ = frozen_states(load_checkpoint("spectrafm-base")[0], tokenizer, rows)
    label = states.pixels[:, 100] - states.pixels[:, 104]  # a colour
    found = fit_pixels(states.pixels)
    pixels = base.add_pixels(0, *found.directions.shape)
    pixels.load_state_dict(found.state_dict())
    folds = make_folds([str(i) for i in used], 5, 0)
    nothing = np.zeros(len(label))
    choice = choose_heads(base.config, rung, "slope", states, label, nothing, folds, found)
    assert any("pixels" in name for name in choice.weights)
    for part, correction in zip(
        choice.fitted, base.add_corrections([part.settings for part in choice.fitted]), strict=True
    ):
        part.fill(correction)
    tokenizer.add_label("slope")
    tokenizer.requests, tokenizer.pixel_wavelength = None, [states.wavelength]
    save_checkpoint(base, tokenizer, tmp_path / "mine")
    model, tokenizer = load_checkpoint(tmp_path / "mine")
    row = model.config.label_names.index("slope")
    values, errors = choice.predict(base.config, states, found(torch.from_numpy(states.pixels)))
    with torch.no_grad():
        output = model(**spectra_of(stars, tokenizer))
    np.testing.assert_allclose(output.predictions[:, row], values, atol=1e-3 * np.std(label))
    np.testing.assert_allclose(output.prediction_errors[:, row], errors, rtol=0.01)
    columns = {name: np.array(stars[name].to_pylist()) for name in ("wavelength", "flux", "flux_error", "mask")}
    columns["mask"][:, 200:230] = True
    columns = {name: column[:, np.r_[0:60, 62:343]] for name, column in columns.items()}
    with torch.no_grad():
        again = model(**tokenizer(columns)).predictions[:, row].numpy()
    assert np.std(again - values) < 0.2 * np.std(label)


@pytest.mark.slow
def test_a_tuned_checkpoint_is_tuned_again(tuned, stars, tmp_path):
    made, _, _ = tuned
    labels = tmp_path / "labels.csv"
    lines = [
        f"{star},{logg - 1.0},{fe_h}"
        for star, logg, fe_h in zip(*(stars[name].to_pylist() for name in ("object_id", "logg", "fe_h")), strict=True)
    ]
    labels.write_text("\n".join(["object_id,logg,fe_h", *lines]) + "\n")
    again = finetune([STARS], labels, tmp_path / "again", model=str(made.folder), names=["logg"])
    model, tokenizer = load_checkpoint(again.folder)
    assert list(dict.fromkeys(each["label"] for each in model.config.corrections)) == ["log_lm", "logg"]
    assert len(model.config.pixel_sets) == len(tokenizer.pixel_wavelength) == 2
    first, _ = load_checkpoint(made.folder)
    inputs = spectra_of(stars, tokenizer)
    with torch.no_grad():
        values, before = model(**inputs).predictions, first(**inputs).predictions
    truth = np.array(stars["logg"].to_pylist()) - 1.0
    assert abs(np.median(values[:, 1].numpy() - truth)) < 0.05
    row = model.config.label_ids(["log_lm"])[0] - FIRST_LABEL_ID
    assert torch.equal(values[:, row], before[:, row])


def test_the_same_again_changes_nothing_and_another_wish_is_refused(tuned):
    made, _, labels = tuned
    weights = (made.folder / "model.safetensors").read_bytes()
    again = finetune([STARS], labels, made.folder)
    assert again.evaluation == json.loads((made.folder / "evaluation.json").read_text())[0]
    assert (made.folder / "model.safetensors").read_bytes() == weights and again.heads == made.heads
    with pytest.raises(ValueError, match=r"out: expected a fine-tuning with seed=1 in .*, got 0; overwrite starts"):
        finetune([STARS], labels, made.folder, seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("few", "stars: expected at least 20 with a spectrum and a label, got 12"),
        ("none", r"labels: expected identifiers of the spectra \(.*\) in the column object_id, got"),
        ("constant", "logg: expected values that differ, got 5 for all spectra"),
        ("elsewhere", "out: expected a new folder, or a fine-tuning to resume, got other files in"),
        ("pixels", "model: expected a checkpoint on evidence, such as spectrafm-base, got"),
        (
            "range",
            r"spectra: expected some that the checkpoint can predict, got none; first: wavelength: expected ",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    tmp_path, stars, change, message, tiny_model, tiny_tokenizer
):
    labels = write_labels(tmp_path / "labels.csv", stars, slice(0, 12 if change == "few" else None))
    files, settings = [STARS], {"names": ["logg"]}
    if change == "none":
        labels.write_text(labels.read_text().strip().replace("\n", "\nx"))
    if change == "constant":
        heading, *lines = labels.read_text().splitlines()
        labels.write_text("\n".join([heading, *(f"{line.split(',')[0]},5,0.1,1" for line in lines)]))
    if change == "elsewhere":
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("mine")
    if change == "pixels":
        spectrafm_hf.checkpoints.save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "tiny")
        settings["model"] = str(tmp_path / "tiny")
    if change == "range":
        column = stars.column_names.index("wavelength")
        moved = pa.array([[10 * w for w in row] for row in stars["wavelength"].to_pylist()], pa.list_(pa.float32()))
        files = [tmp_path / "far.parquet"]
        pq.write_table(stars.set_column(column, "wavelength", moved), files[0])
    with pytest.raises(ValueError, match=message) as caught:
        finetune(files, labels, tmp_path / "mine", **settings)
    assert "\n" not in str(caught.value)
    assert change == "elsewhere" or not (tmp_path / "mine").exists()


@pytest.mark.slow
def test_spectra_without_errors_do_too(tmp_path, stars):
    nothing = pa.array([[float("nan")] * len(row) for row in stars["flux"].to_pylist()], pa.list_(pa.float32()))
    pq.write_table(
        stars.set_column(stars.column_names.index("flux_error"), "flux_error", nothing), tmp_path / "x.parquet"
    )
    labels = write_labels(tmp_path / "labels.csv", stars)
    made = finetune([tmp_path / "x.parquet"], labels, tmp_path / "mine", names=["logg"])
    assert made.evaluation["results"]["all stars"]["fine-tuned"]["logg"]["rmse"] < 0.4


def test_spectra_that_do_not_state_a_frame_are_at_rest_as_in_predictions(tmp_path, monkeypatch):
    stars = list(islice(SyntheticStars("apogee", seed=3), 3))
    for i, star in enumerate(stars):
        moved = np.asarray(star["wavelength"], np.float64) * (1 + 60.0 / SPEED_OF_LIGHT)
        good = ~np.asarray(star["mask"], bool)
        columns = np.stack([moved, star["flux"], star["flux_error"]], axis=1)[good]
        np.savetxt(tmp_path / f"{i}.txt", columns, header="wavelength flux flux_error", comments="")
    labels = tmp_path / "labels.csv"
    labels.write_text("file,age[Gyr]\n" + "".join(f"{i}.txt,{i}\n" for i in range(3)))

    def stop(*args, **options):
        raise ValueError(read_data_set(*args, **options)[0].with_format("numpy")[:])

    monkeypatch.setattr(finetuning, "read_data_set", stop)
    with pytest.raises(ValueError, match="wavelength") as stopped:
        finetune(sorted(tmp_path.glob("*.txt")), labels, tmp_path / "mine")
    read = stopped.value.args[0]
    for star, wavelength in zip(stars, read["wavelength"], strict=True):
        at_rest = np.asarray(star["wavelength"])[~np.asarray(star["mask"], bool)]
        assert abs(np.median(wavelength / at_rest - 1)) * SPEED_OF_LIGHT < 3.0
    assert read["rest_frame"].all()
