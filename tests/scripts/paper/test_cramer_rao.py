"""The bound of an instrument as a command, and the distance of a checkpoint from it."""

import json

import numpy as np
import pytest

from spectrafm_hf.checkpoints import save_checkpoint


SMALL = """
name: small
emulator: emulator-hband
wavelength: {detectors: [{log10_start: 4.179, log10_step: 6.0e-6, first: 300, last: 699}]}
line_spread: {resolving_power: 22500}
noise: {snr: 100}
normalisation: continuum
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_the_bound_of_a_user_instrument(run_script, small, tmp_path):
    output = tmp_path / "bound.json"
    arguments = ("--instrument", small, "--stars", 5, "--snr", 50, 100, "--output", output)
    code, printed, error = run_script("paper/cramer_rao.py", *arguments)
    assert code == 0, error
    assert "400 of 400 pixels; 5 held-out stars of emulator-hband" in printed and "teff [K]" in printed
    report = json.loads(output.read_text())
    at_50, at_100 = (report["results"][snr] for snr in ("50", "100"))
    assert list(at_50) == ["teff", "logg", "fe_h", "alpha_m", *list(report["prior"])[3:]]
    # Half the noise, half the error, but for the priors, which count with so few pixels.
    assert at_50["fe_h"]["bound"] == pytest.approx(2 * at_100["fe_h"]["bound"], rel=0.1)
    assert report["command"].startswith("python scripts/paper/cramer_rao.py --instrument")


def test_fewer_pixels_have_a_greater_bound_and_a_mask_counts_as_a_range_does(run_script, small, tmp_path):
    def bound(*arguments):
        output = tmp_path / "bound.json"
        code, printed, error = run_script(
            "paper/cramer_rao.py", "--instrument", small, "--stars", 4, "--snr", 100, "--output", output, *arguments
        )
        assert code == 0, error
        report = json.loads(output.read_text())
        return report["pixels"]["used"], np.array([one["bound"] for one in report["results"]["100"].values()])

    n_all, whole = bound()
    n_half, half = bound("--range", 15100, 15204)
    n_masked, masked = bound("--mask", 15204.0001, 16000)
    assert n_all == 400 and 150 < n_half < 250 and n_masked == n_half
    np.testing.assert_allclose(masked, half, rtol=1e-6)
    assert np.all(half > whole)
    _, known = bound("--prior", "teff", 1.0)
    assert known[0] < 1.0 < whole[0]


def test_a_checkpoint_is_compared_with_the_bound_on_the_same_stars(
    run_script, small, tmp_path, tiny_model, tiny_tokenizer
):
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "tiny")
    output = tmp_path / "bound.json"
    arguments = ("--instrument", small, "--stars", 6, "--snr", 100, "--model", tmp_path / "tiny", "--white")
    code, printed, error = run_script("paper/cramer_rao.py", *arguments, "--output", output)
    assert code == 0, error
    assert "error/sigma" in printed
    report = json.loads(output.read_text())
    assert set(report["results"]["100"]) == {"teff", "logg", "fe_h", "alpha_m"}
    for figures in report["results"]["100"].values():
        assert figures["answered"] == 6
        assert figures["ratio"] == pytest.approx(figures["scatter"] / figures["bound"])
        assert figures["strict_ratio"] == pytest.approx(figures["scatter"] / figures["scatter_at_bound"])
    assert report["noise"] == "white" and len(report["model"]["model_sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--instrument", "no-such"], "instrument: expected one of"),
        (["--emulator", "no-such"], "emulator: expected one of"),
        (["--snr", "0"], "snr: expected positive numbers, got 0.0"),
        (["--range", "3", "1"], "range: expected the lower wavelength first, got 3 1"),
        (["--mask", "1", "99999"], "range, mask: expected some that leave pixels of apogee"),
        (["--prior", "teff", "warm"], "expected a label and numbers, got 'teff warm'"),
        (["--label-range", "age", "1", "2"], "ranges: expected labels out of"),
        (["--stars", "0"], "stars: expected at least 1, got 0"),
        (["--model", "no-such"], "checkpoint: expected one of the bundled"),
        (["--output", "nowhere/bound.json"], "output: expected a folder that exists, got nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_script, arguments, message):
    code, printed, error = run_script("paper/cramer_rao.py", "--stars", 2, *arguments)
    assert code == 2 and printed == ""
    assert len(error.strip().splitlines()) == 1 and message in error
