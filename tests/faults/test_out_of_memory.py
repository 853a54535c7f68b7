"""Batches too large for memory, by a limit on the address space of a process."""

import subprocess
import sys
import textwrap

import pytest
from fault_table import tried


SCRIPT = """
    import resource, sys
    import numpy as np
    import torch
    from conftest import make_tiny_model
    from spectrafm_hf import SpectraFMTokenizer
    from spectrafm_hf.inference.prediction import predict_batches

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    pixels = 400
    rows = [
        {"object_id": str(i), "wavelength": np.arange(5000.0, 5000 + pixels), "flux": random.normal(1, 0.1, pixels),
         "flux_error": np.full(pixels, 0.1), "mask": np.zeros(pixels, bool)}
        for i in range(128)
    ]
    # Wide: what a star takes in the model is far more than what its pixels take.
    model, tokenizer = make_tiny_model(encoder_ffn_dim=8192), SpectraFMTokenizer()
    few = list(predict_batches(model, tokenizer, [rows[:8], rows[8:16]]))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    free = int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (used + free, used + free))
    many = list(predict_batches(model, tokenizer, [rows, rows[:40]]))
    assert [len(batch["flags"]) for batch in many] == [128, 40]
    assert np.isfinite(many[0]["teff"]).all()
    np.testing.assert_allclose(many[0]["teff"][:8], few[0]["teff"], rtol=1e-4)
    np.testing.assert_array_equal(many[1]["teff"][:8], many[0]["teff"][:8])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize(("free", "halved"), [(400, True), pytest.param(4000, False, marks=pytest.mark.slow)])
def test_a_batch_that_is_too_large_is_split(free, halved, pytestconfig):
    with tried("batch too large for the memory", "nothing: half of it at a time", int(halved)):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(free)],
            cwd=pytestconfig.rootpath / "tests",
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert run.returncode == 0, run.stderr
        assert ("out of memory with 128 stars in a batch" in run.stderr) == halved
        # It is not tried again with the next batch.
        assert run.stderr.count("with 128") == halved and "with 40" not in run.stderr


TRAINING = """
    import resource, sys
    from pathlib import Path
    import torch
    from test_trainer import losses_of, make_arguments, make_stars, recipe_from_nothing
    from spectrafm_hf.training.trainer import train

    torch.set_num_threads(1)
    stars, folder = make_stars(512, 1), Path(sys.argv[1])
    recipe = recipe_from_nothing()
    recipe.model |= {"encoder_ffn_dim": [4096], "dropout": 0.0}
    settings = {"per_device_train_batch_size": 128, "gradient_accumulation_steps": 2, "max_steps": 2,
                "eval_strategy": "no", "save_strategy": "no", "per_device_eval_batch_size": 8}
    runs = []
    for free in (None, int(sys.argv[2]) * 2**20):
        if free:
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + free, used + free))
        runs.append(train(recipe, make_arguments(folder, **settings), stars, stars.select(range(16)), quiet=True))
    assert runs[0].most == 0 and 0 < runs[1].most < 128, runs[1].most
    for one, other in zip(*map(losses_of, runs), strict=True):
        assert abs(one - other) < 1e-5 * abs(one), (one, other)
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
def test_a_training_whose_batch_is_too_large_takes_the_same_steps_in_parts(tmp_path, pytestconfig):
    with tried("batch of a training too large for the memory", "nothing: half of it at a time", 1):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(TRAINING), str(tmp_path), "200"],
            cwd=pytestconfig.rootpath / "tests" / "training",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("out of memory with 128 stars in a batch: 64 from now on") == 1
