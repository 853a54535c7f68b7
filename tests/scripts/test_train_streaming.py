"""Training on a stream of shards: the same curve with one and two processes, and after an interruption."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from test_train_accelerate import PIXELS, RANDOM, RECIPE, assert_alike, curves, run, same_weights

from spectrafm_hf.data import spectrum_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a data set of five shards, spectra whose slope is Teff, and two recipes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    generator = np.random.default_rng(0)
    sizes = {"train": (120, 100, 90, 130, 80), "validation": (64,)}
    for split, shard, n in ((split, i, n) for split, ns in sizes.items() for i, n in enumerate(ns)):
        teff = generator.uniform(4000, 6000, n)
        flux = 1 + (teff[:, None] - 5000) / 4000 * (PIXELS - 4390) / 390
        flux += 0.01 * generator.standard_normal(flux.shape)
        rows = {
            "object_id": [str(i) for i in range(n)],
            "survey": ["test"] * n,
            "wavelength": [PIXELS] * n,
            "flux": list(flux.astype(np.float32)),
            "flux_error": [np.full(PIXELS.size, 0.01, np.float32)] * n,
            "mask": [np.zeros(PIXELS.size, bool)] * n,
            "snr": [100.0] * n,
            "teff": teff,
            "teff_err": np.full(n, 20.0),
        }
        data = Dataset.from_dict(rows, features=spectrum_features(["teff"], []))
        data.to_parquet(folder / "data" / f"{split}-{shard:05d}-of-{len(sizes[split]):05d}.parquet")
    streamed = {**RECIPE, "streaming": True}
    (folder / "plain.yaml").write_text(yaml.safe_dump(streamed))
    (folder / "random.yaml").write_text(yaml.safe_dump({**streamed, **RANDOM}))
    return folder


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_and_so_do_both_scripts(folder):
    run(folder, "train_accelerate.py", "random", "one")
    one = curves(folder / "one")
    assert len(one) == 16  # 520 stars: 8 whole batches of 64, twice
    half = ("--per_device_train_batch_size", "32")
    for script, output in (("train_accelerate.py", "two"), ("train.py", "two-trainer")):
        run(folder, script, "random", output, *half, processes=2)
        assert_alike(one, curves(folder / output))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "train_accelerate.py"])
def test_a_run_resumes_in_the_middle_of_an_epoch(folder, script):
    run(folder, script, "random", f"{script}-whole", "--save_total_limit", "9")
    before = str(folder / f"{script}-whole" / "checkpoint-12")
    run(folder, script, "random", f"{script}-resumed", "--resume_from_checkpoint", before)
    assert curves(folder / f"{script}-resumed") == curves(folder / f"{script}-whole")
    assert same_weights(folder / f"{script}-resumed", folder / f"{script}-whole")
