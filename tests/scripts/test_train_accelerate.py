"""The two training scripts agree on one process, on two, and after a kill."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data import spectrum_features


SCRIPTS = Path(__file__).parents[2] / "scripts"
PIXELS = np.linspace(4000, 4780, 40, dtype=np.float32)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
RECIPE = {
    "data": "data",
    "labels": ["teff"],
    "units": ["K"],
    "muon_learning_rate": 4e-3,
    "ema_decay": 0.9,
    "model": {
        "hidden_size": 32,
        "encoder_attention_heads": [2],
        "encoder_ffn_dim": [32],
        "decoder_attention_heads": [2],
        "decoder_ffn_dim": [32],
        "readout_dims": [32],
        "initializer_range": 0.05,
    },
    "per_device_train_batch_size": 64,
    "num_train_epochs": 2,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 5,
}
RANDOM = {"noise": 0.5, "pixel_dropout": 0.05, "error_dropout": 0.3, "tilt": 0.02}
#: Draws numbers for each star and each batch, but leaves the few pixels that there are; labels that some stars have.
AUGMENTED = {
    "labels": ["teff", "fe_h"],
    "units": ["K", "dex"],
    "noise_correlation": 1.0,
    "snr": [20, 300],
    "radial_velocity": 50.0,
    "smoothing": 0.5,
    "reddening": 0.1,
    "resampling": 0.3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a data set of spectra whose slope is Teff, and two recipes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    generator = np.random.default_rng(0)
    for split, n_stars in (("train", 512), ("validation", 128)):
        teff = generator.uniform(4000, 6000, n_stars)
        flux = 1 + (teff[:, None] - 5000) / 4000 * (PIXELS - 4390) / 390
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
            # Known of some stars, and of more of them at the end of the table.
            "fe_h": np.where(generator.random(n_stars) < np.linspace(0.1, 0.9, n_stars), teff / 4000 - 1, np.nan),
            "fe_h_err": np.full(n_stars, 0.01),
        }
        data = Dataset.from_dict(rows, features=spectrum_features(["teff", "fe_h"], []))
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "plain.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "augmented.yaml").write_text(yaml.safe_dump({**RECIPE, **RANDOM, **AUGMENTED}))
    dropout = {"model": {**RECIPE["model"], "dropout": 0.05}}
    (folder / "random.yaml").write_text(yaml.safe_dump({**RECIPE, **RANDOM, **dropout}))
    return folder


def command(script: str, recipe: str, output: str, *options: str, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        config = str(SCRIPTS / "accelerate" / "cpu.yaml")
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
        launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [*launch, str(SCRIPTS / script), f"{recipe}.yaml", "--output_dir", output, *options]


def run(folder: Path, *args, **kwargs):
    done = subprocess.run(command(*args, **kwargs), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def curves(folder: Path) -> list[dict[str, str]]:
    with (folder / "curves.csv").open() as file:
        # What else is logged at the end of a run is about its speed.
        names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_teff_rmse")
        return [{name: row[name] for name in names} for row in csv.DictReader(file)]


def assert_alike(one: list[dict[str, str]], other: list[dict[str, str]]):
    for first, second in zip(one, other, strict=True):
        assert first["step"] == second["step"]
        for name in ("loss", "eval_loss"):
            if first[name]:
                assert float(second[name]) == pytest.approx(float(first[name]), rel=1e-5, abs=1e-5)


def same_weights(*folders: Path) -> bool:
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in folders)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def by_trainer(folder) -> Path:
    run(folder, "train.py", "random", "trainer", "--gradient_accumulation_steps", "3")
    return folder / "trainer"


@pytest.mark.slow
def test_both_scripts_give_the_same_curves_and_the_same_weights_to_the_last_bit(folder, by_trainer):
    run(folder, "train_accelerate.py", "random", "loop", "--gradient_accumulation_steps", "3")
    assert len(curves(by_trainer)) == 6  # 8 batches in an epoch: 3 + 3 + 2, twice
    assert curves(folder / "loop") == curves(by_trainer)
    assert same_weights(folder / "loop", by_trainer)
    config = "final/config.json"
    assert (folder / "loop" / config).read_bytes() == (by_trainer / config).read_bytes()
    load_checkpoint(str(folder / "loop" / "final"))
    assert sorted(path.name for path in (folder / "loop").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_an_invalid_recipe_is_one_line(folder, run_script, monkeypatch):
    monkeypatch.chdir(folder)
    for script in ("train.py", "train_accelerate.py"):
        code, _, err = run_script(script, "plain.yaml", "--output_dir", "out", "--early_stopping_patience", "2")
        assert code == 2
        assert err.splitlines()[-1].startswith(f"{script}: early_stopping_patience: expected load_best_model")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["plain", "augmented"])
def test_two_processes_give_the_curve_of_one_with_the_same_global_batch(folder, recipe):
    """But for dropout and `sources`: their numbers are drawn for the part that a process has."""
    run(folder, "train_accelerate.py", recipe, f"{recipe}-one")
    one = curves(folder / f"{recipe}-one")
    half = ("--per_device_train_batch_size", "32")
    for script in ("train_accelerate.py", "train.py"):
        run(folder, script, recipe, f"{recipe}-{script}", *half, processes=2)
        assert_alike(one, curves(folder / f"{recipe}-{script}"))
        for checkpoint in (folder / f"{recipe}-{script}").glob("checkpoint-*"):
            assert len(list(checkpoint.glob("random_states_*" if "accelerate" in script else "rng_state_*"))) == 2


@pytest.mark.slow
def test_a_batch_in_two_parts_gives_the_curve_of_the_whole_where_labels_are_not_known(folder):
    apart = {**RECIPE, **RANDOM, **AUGMENTED} | {"resampling": 0.0}
    (folder / "apart.yaml").write_text(yaml.safe_dump(apart))
    run(folder, "train.py", "apart", "whole")
    half = ("--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "2")
    for script in ("train_accelerate.py", "train.py"):
        run(folder, script, "apart", f"halves-{script}", *half)
        assert_alike(curves(folder / "whole"), curves(folder / f"halves-{script}"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "train_accelerate.py"])
def test_a_run_killed_at_any_moment_resumes_exactly(folder, script):
    options = ("--num_train_epochs", "6", "--save_steps", "5")
    run(folder, script, "random", f"{script}-whole", *options)
    output = folder / f"{script}-killed"
    seed = random.randrange(1000)
    print(f"moments of seed {seed}")  # pytest shows it where the test fails
    generator = random.Random(seed)
    for _ in range(2):
        before = {path.name for path in output.glob("checkpoint-*")}
        killed = command(script, "random", output.name, *options, "--resume_from_checkpoint", "last")
        process = subprocess.Popen(
            killed, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and {path.name for path in output.glob("checkpoint-*")} <= before:
            time.sleep(0.005)
        time.sleep(generator.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "killed before it was done"
    run(folder, script, "random", output.name, *options, "--resume_from_checkpoint", "last")
    assert curves(output) == curves(folder / f"{script}-whole")
    assert len(curves(output)) == 48 and same_weights(output, folder / f"{script}-whole")
