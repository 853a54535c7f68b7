import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from script_loader import load_script

from spectrafm_hf import SpectraFMTokenizer
from spectrafm_hf.checkpoints import save_checkpoint
from spectrafm_hf.data import pixel_column
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction
from spectrafm_hf.training.baselines import BASELINES, MLPBaseline
from spectrafm_hf.training.metrics import label_metrics


SCRIPT = Path(__file__).parents[3] / "scripts" / "paper" / "evaluate.py"
WAVELENGTH = np.arange(4000, 4240, 10, dtype=np.float32)
LABELS = ("teff", "logg", "fe_h", "alpha_m")
MAIN, ALL, POOR = "3500 K < teff < 6500 K", "all stars", "[Fe/H] < -1"
AGREEING = f"{MAIN}, label and colours agree"
SETTINGS = {
    "ridge": {"train_teff": None, "train_min_snr": 0, "transform": "raw", "alpha": 1e-4},
    "cannon": {"train_teff": [3000, 7500], "train_min_snr": 20, "transform": "raw", "n_candidates": 100},
    "boosting": {"train_teff": None, "train_min_snr": 0, "transform": "raw", "n_components": 4, "leaves": 8},
    "mlp": {
        "train_teff": None,
        "train_min_snr": 0,
        "transform": "raw",
        "epochs": 4,
        "batch_size": 64,
        "n_components": 4,
        "widths": [16],
    },
}

SETTINGS["tokens"] = SETTINGS["mlp"] | {"errors_as_inputs": True}


@pytest.fixture(scope="module")
def evaluate():
    return load_script("paper/evaluate")


def write_split(folder: Path, split: str, n: int, seed: int) -> dict[str, np.ndarray]:
    """Stars whose flux is linear in four labels; made up."""
    random = np.random.default_rng(seed)
    x = random.uniform(-1, 1, (n, 4))
    flux = 1 + x @ np.random.default_rng(99).normal(0, 0.05, (4, WAVELENGTH.size)) + random.normal(0, 0.005, (n, 24))
    columns = {
        "teff": 5000 + 2000 * x[:, 0],
        "logg": 3 + 2 * x[:, 1],
        "fe_h": -0.8 + x[:, 2],
        "alpha_m": 0.1 + 0.2 * x[:, 3],
    }
    columns["fe_h"][::10] = np.nan
    columns |= {f"{name}_err": np.full(n, 0.01) for name in LABELS}
    columns |= {"snr": random.uniform(10, 100, n), "ak_targ": random.uniform(0, 1, n)}
    mask = random.random(flux.shape) < 0.02
    table = pa.table(
        {
            "object_id": [f"{split}-{i}" for i in range(n)],
            "survey": ["made-up"] * n,
            "wavelength": pixel_column(np.broadcast_to(WAVELENGTH, flux.shape)),
            "flux": pixel_column(np.where(mask, np.nan, flux)),
            "flux_error": pixel_column(np.full(flux.shape, 0.005)),
            "mask": pixel_column(mask),
            **{name: pa.array(column.astype(np.float32)) for name, column in columns.items()},
        }
    )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    half = n // 2
    for i, part in enumerate((table[:half], table[half:])):
        pq.write_table(part, folder / "data" / f"{split}-{i:05d}-of-00002.parquet")
    return {name: column.astype(np.float32) for name, column in columns.items()}


@pytest.fixture
def data(tmp_path):
    for seed, (split, n) in enumerate({"train": 400, "validation": 120, "test": 90}.items()):
        write_split(tmp_path / "stars", split, n, seed)
    return tmp_path / "stars"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"baselines": {name: {"chosen": chosen} for name, chosen in SETTINGS.items()}}))
    return path


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer):
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_one_command_compares_a_checkpoint_with_all_baselines(evaluate, data, recipe, checkpoint, tmp_path, capsys):
    output, picture = tmp_path / "results.json", tmp_path / "picture.png"
    arguments = ["--model", str(checkpoint), "--data", str(data), "--recipe", str(recipe)]
    assert evaluate.main([*arguments, "--output", str(output), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())

    rows = ["ridge", "Cannon", "boosted trees", "PCA + MLP", "MLP on tokens", "tiny"]
    assert list(report["results"]) == [MAIN, ALL, POOR, AGREEING]
    for title, table in report["results"].items():
        assert list(table) == rows
        assert title in printed
        assert [list(figures) for figures in table.values()] == [list(LABELS)] * len(rows)
    assert "test stars" in printed and "here the same stars" not in printed
    assert sum(line.startswith(tuple(f"| {row} " for row in rows)) for line in printed.splitlines()) == 4 * len(rows)

    truth = write_split(tmp_path / "again", "test", 90, 2)
    main = (truth["teff"] > 3500) & (truth["teff"] < 6500)
    assert report["stars"].pop(AGREEING) <= main.sum()
    assert report["stars"] == {MAIN: main.sum(), ALL: 90, POOR: (truth["fe_h"] < -1).sum()}
    assert report["results"][MAIN]["ridge"]["teff"]["n"] == main.sum()
    assert report["results"][ALL]["tiny"]["fe_h"]["n"] == 81
    # These spectra are linear in the labels, so both linear models find them; the random checkpoint does not.
    for name in ("ridge", "Cannon"):
        assert report["results"][MAIN][name]["teff"]["robust_scatter"] < 200
        assert 0.6 < report["results"][MAIN][name]["teff"]["robust_z"] < 1.6
    assert report["results"][MAIN]["tiny"]["teff"]["robust_scatter"] > 400

    weights = (checkpoint / "model.safetensors").read_bytes()
    assert report["models"]["tiny"]["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert report["models"]["Cannon"]["settings"] == SETTINGS["cannon"]
    assert report["models"]["PCA + MLP"]["seed"] == 0
    assert set(report["data_sha256"]) == {"train", "validation", "test"}
    assert report["split"] == "test" and "--output" in report["command"]
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["seconds"]["ridge"]["fit"] > 0 and report["threads"] >= 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_a_label_that_contradicts_the_colours_is_found_and_others_are_not(evaluate, tmp_path):
    """Black bodies behind dust of random thickness, some of which have the temperature of another star."""
    random = np.random.default_rng(0)
    wavelength = np.arange(3600.0, 10000.0, 40.0)

    def stars(n, wrong):
        teff = random.uniform(3600, 6400, n)
        flux = 1.0 / (wavelength / 1e4) ** 5 / np.expm1(1.4388e8 / wavelength / teff[:, None])
        flux *= np.exp(-random.uniform(0, 1, (n, 1)) * (5500.0 / wavelength) ** 1.6)
        flux /= np.median(flux, axis=1, keepdims=True)
        flux *= 1 + random.normal(0, 0.003, flux.shape)
        teff[wrong] = 10_000.0 - teff[wrong]
        labels = np.stack([teff, np.zeros(n)], axis=1)
        spectra = evaluate.Spectra(flux, np.full(flux.shape, 0.003), labels, np.full((n, 2), 1.0), np.empty((n, 0)))
        return evaluate.Stars(np.arange(n), wavelength, spectra, ["teff", "fe_h"], np.full(n, 100.0), "")

    train, test = stars(2000, slice(0, 40)), stars(500, slice(0, 20))
    moved = np.abs(test.label("teff")[:20] - 5000.0) > 500.0
    found = evaluate.contradicts_colour(test, train)
    assert moved.sum() > 5 and found[:20][moved].all()
    assert found[20:].mean() < 0.01


def test_the_figures_of_the_checkpoint_are_those_of_its_own_predictions(evaluate, data, checkpoint, tmp_path):
    output = tmp_path / "results.json"
    arguments = ["--model", str(checkpoint), "--data", str(data), "--split", "validation", "--baselines", "none"]
    assert evaluate.main([*arguments, "--output", str(output)]) == 0
    table = json.loads(output.read_text())["results"][ALL]["tiny"]

    rows = pq.read_table(sorted((data / "data").glob("validation-*.parquet"))).to_pydict()
    model, tokenizer = (
        SpectraFMForPrediction.from_pretrained(checkpoint),
        SpectraFMTokenizer.from_pretrained(checkpoint),
    )
    with torch.no_grad():
        answer = model(**tokenizer(rows))
    for i, name in enumerate(LABELS):
        expected = label_metrics(
            answer.predictions[:, i], answer.prediction_errors[:, i], rows[name], rows[f"{name}_err"]
        )
        assert table[name] == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_with_fewer_labels_gets_the_columns_it_has(evaluate, data, tmp_path, capsys):
    torch.manual_seed(0)
    labels = {"label_names": ["logg"], "label_units": ["dex"], "label_centers": [3.0], "label_scales": [1.0]}
    sizes = {"hidden_size": 8, "encoder_attention_heads": [2], "encoder_ffn_dim": [8]}
    decoder = {"decoder_attention_heads": [2], "decoder_ffn_dim": [8], "readout_dims": [4]}
    model = SpectraFMForPrediction(SpectraFMConfig(**labels, **sizes, **decoder))
    save_checkpoint(model, SpectraFMTokenizer(label_names=["logg"]), tmp_path / "one")
    output = tmp_path / "results.json"
    arguments = ["--model", str(tmp_path / "one"), "--data", str(data), "--baselines", "none", "--output", str(output)]
    assert evaluate.main(arguments) == 0
    assert list(json.loads(output.read_text())["results"][MAIN]["one"]) == ["logg"]


def test_the_table_of_baselines_alone_states_their_calibration(evaluate, data, recipe, capsys):
    arguments = ["--model", "none", "--data", str(data), "--recipe", str(recipe), "--baselines", "ridge"]
    assert evaluate.main([*arguments, "--split", "validation"]) == 0
    printed = capsys.readouterr().out
    assert "validation stars" in printed and "here the same stars" in printed and "Cannon" not in printed


def test_tuning_never_opens_the_test_split_and_resumes(evaluate, data, tmp_path, monkeypatch, capsys):
    for file in (data / "data").glob("test-*.parquet"):
        file.write_bytes(b"reading this would fail")
    start = {"train_teff": None, "train_min_snr": 0, "transform": "raw", "alpha": 1e3}
    search = [("alpha", [1e2, 1e-4]), ("train_min_snr", [90])]
    monkeypatch.setitem(evaluate.SEARCH, "ridge", (start, search))
    recipe = tmp_path / "new.json"
    arguments = ["--tune", "--baselines", "ridge", "--data", str(data), "--recipe", str(recipe)]
    assert evaluate.main(arguments) == 0
    content = recipe.read_text()
    entry = json.loads(content)["baselines"]["ridge"]
    assert entry["complete"]
    assert [figures["settings"]["alpha"] for figures in entry["tried"]] == [1e3, 1e2, 1e-4, 1e-4]
    best = min(entry["tried"], key=lambda figures: figures["score"])
    assert entry["chosen"] == best["settings"] and best["settings"]["alpha"] == 1e-4
    assert set(best["robust_scatter"]) == set(LABELS)
    capsys.readouterr()
    assert evaluate.main(arguments) == 0
    assert recipe.read_text() == content
    assert capsys.readouterr().out == ""


def test_a_table_without_stars_is_null_in_the_json_and_not_a_crash(evaluate, tmp_path, checkpoint):
    write_split(tmp_path / "few", "test", 20, 0)
    path = sorted((tmp_path / "few" / "data").glob("*.parquet"))
    for file in path:
        table = pq.read_table(file)
        index = table.column_names.index("fe_h")
        pq.write_table(table.set_column(index, "fe_h", pa.array(np.zeros(len(table), np.float32))), file)
    output = tmp_path / "results.json"
    arguments = ["--model", str(checkpoint), "--data", str(tmp_path / "few"), "--baselines", "none"]
    assert evaluate.main([*arguments, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["results"][POOR]["tiny"]["teff"]
    assert figures["n"] == 0 and figures["robust_scatter"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "no-such-checkpoint"], "checkpoint: expected one of the bundled"),
        (["--data", "nowhere"], "data: expected files"),
        (["--model", "none", "--baselines", "none"], "expected at least one of them"),
        (["--output", "nowhere/results.json"], "output: expected a folder that exists, got nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(evaluate, data, change, message, capsys):
    arguments = ["--model", "none", "--baselines", "none", "--data", str(data)]
    if "--model" not in change:
        arguments[1] = "no-such-checkpoint"
    assert evaluate.main([*arguments, *change]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_an_unknown_option_is_one_line_and_exit_code_2(evaluate, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--split", "train"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_spectra_on_different_grids_are_refused(evaluate, data, recipe, capsys):
    file = sorted((data / "data").glob("train-*.parquet"))[0]
    table = pq.read_table(file)
    shifted = pixel_column(np.broadcast_to(WAVELENGTH + 1, (len(table), WAVELENGTH.size)))
    pq.write_table(table.set_column(table.column_names.index("wavelength"), "wavelength", shifted), file)
    assert evaluate.main(["--model", "none", "--data", str(data), "--recipe", str(recipe)]) == 2
    assert "wavelength: expected one grid for all rows" in capsys.readouterr().err


def test_the_committed_recipe_holds_what_was_tried_and_the_best_of_it_for_every_baseline(evaluate):
    recipe = json.loads(evaluate.RECIPE.read_text())
    assert "validation" in recipe["measured_on"] and set(recipe["data_sha256"]) == {"train", "validation"}
    classes = {**BASELINES, "tokens": MLPBaseline}
    assert set(recipe["baselines"]) == set(classes)
    for name, entry in recipe["baselines"].items():
        best = min(entry["tried"], key=lambda figures: figures["score"])
        assert entry["chosen"] == best["settings"]
        assert len(entry["tried"]) >= 5
        assert all(math.isfinite(figures["score"]) for figures in entry["tried"])
        settings = {key: value for key, value in best["settings"].items() if not key.startswith("train_")}
        assert classes[name](**settings)
