"""The rows of the table of robustness, and the command that makes it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from script_loader import load_script

from spectrafm_hf.checkpoints import save_checkpoint
from spectrafm_hf.data import pixel_column
from spectrafm_hf.data.gaia_xp import WAVELENGTH
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.models.gate_spectrafm import vacuum_to_air
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.line_spread import pixel_edges


SCRIPT = Path(__file__).parents[3] / "scripts" / "paper" / "evaluate_robustness.py"
XP_ROWS = [
    "whole",
    "one of 343 pixels masked",
    "10 % masked",
    "30 % masked",
    "five pixels absent from the table",
    "rebinned by two",
    "10 A grid",
    "logarithmic grid",
    "five wild pixels",
]
LABELS = ("teff", "logg", "fe_h", "alpha_m")


@pytest.fixture(scope="module")
def script():
    return load_script("paper/evaluate_robustness")


@pytest.fixture
def spectra(script):
    """Four made-up stars on the grid of Gaia XP, two derivatives of the first three."""
    random = np.random.default_rng(0)
    x = (WAVELENGTH - 6780) / 3420
    flux = 1 + 0.3 * np.sin(8 * x + random.uniform(0, 6, (4, 1))) + 0.5 * x
    slopes = np.stack([np.cos(8 * x), x**2])[None] * random.uniform(0.5, 1, (3, 1, 1))
    error = np.full(flux.shape, 0.01, np.float32)
    wavelength = np.broadcast_to(WAVELENGTH, flux.shape)
    return script.Spectra(wavelength, flux.astype("f4"), error, np.zeros(flux.shape, bool), slopes.astype("f4"))


@pytest.fixture
def change(script, spectra):
    def changed(name, stars=spectra):
        return script.xp_changes()[name](stars, np.random.default_rng(1))

    return changed


def integral(wavelength, flux):
    return flux @ np.diff(pixel_edges(np.asarray(wavelength, np.float64)))


def test_the_rows_of_gaia_xp_are_those_of_the_issue(script):
    assert list(script.xp_changes()) == XP_ROWS


@pytest.mark.parametrize(("name", "count"), [(XP_ROWS[1], 1), (XP_ROWS[2], 34), (XP_ROWS[3], 103)])
def test_so_many_pixels_are_masked_in_every_star_and_others_in_each(change, spectra, name, count):
    changed = change(name)
    assert changed.mask.sum(axis=1).tolist() == [count] * 4
    assert len({star.tobytes() for star in changed.mask}) == 4
    np.testing.assert_array_equal(changed.flux, spectra.flux)


def test_absent_pixels_are_not_in_the_table_and_their_derivatives_neither(change, spectra):
    changed = change("five pixels absent from the table")
    assert changed.flux.shape == (4, 338) and changed.jacobian.shape == (3, 2, 338)
    for i, row in enumerate(changed.rows()):
        kept = np.isin(WAVELENGTH, row["wavelength"])
        assert kept.sum() == 338
        np.testing.assert_array_equal(row["flux"], spectra.flux[i, kept])
        if i < 3:
            np.testing.assert_array_equal(changed.jacobian[i], spectra.jacobian[i][:, kept])


def test_rebinned_flux_is_the_mean_of_two_and_its_error_smaller(change, spectra):
    changed = change("rebinned by two")
    assert changed.flux.shape == (4, 171)
    np.testing.assert_allclose(changed.flux, (spectra.flux[:, 0:342:2] + spectra.flux[:, 1:342:2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(changed.wavelength[0, :2], [3370, 3410])
    np.testing.assert_allclose(changed.error, 0.01 / np.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(changed.jacobian[0, 0, 0], spectra.jacobian[0, 0, :2].mean(), rtol=1e-6)
    # A pixel of which one half is masked is masked.
    spectra.mask[0, 5] = True
    assert np.flatnonzero(change("rebinned by two").mask[0]).tolist() == [2]


@pytest.mark.parametrize("name", ["10 A grid", "logarithmic grid"])
def test_another_grid_conserves_flux_and_follows_a_smooth_spectrum(change, spectra, name):
    changed = change(name)
    grid = changed.wavelength[0]
    assert np.all(np.diff(grid) > 0) and len(grid) == {"10 A grid": 686, "logarithmic grid": 343}[name]
    edges = np.array([grid[0] - (grid[1] - grid[0]) / 2, grid[-1] + (grid[-1] - grid[-2]) / 2])
    np.testing.assert_allclose(edges, [3350, 10210], rtol=1e-4)
    widths = np.diff(np.linspace(3350, 10210, 687) if name == "10 A grid" else np.geomspace(3350, 10210, 344))
    np.testing.assert_allclose(changed.flux @ widths, integral(WAVELENGTH, spectra.flux), rtol=1e-6)
    expected = np.stack([np.interp(grid, WAVELENGTH, star) for star in spectra.flux])
    np.testing.assert_allclose(changed.flux[:, 5:-5], expected[:, 5:-5], atol=2e-3)
    assert not changed.mask.any()


def test_errors_on_another_grid_are_the_scatter_that_noise_gets_there(script, spectra):
    random = np.random.default_rng(2)
    noise = random.normal(0, 0.01, (3000, len(WAVELENGTH))).astype("f4")
    many = script.Spectra(
        np.broadcast_to(WAVELENGTH, noise.shape), noise, np.full(noise.shape, 0.01), np.zeros(noise.shape, bool)
    )
    changed = script.xp_changes()["logarithmic grid"](many, random)
    np.testing.assert_allclose(changed.flux.std(axis=0), changed.error[0], rtol=0.06)


def test_a_masked_pixel_masks_all_new_ones_that_overlap_it_and_its_flux_does_not_leak(change, spectra):
    spectra.mask[0, 100] = True
    spectra.flux[0, 100] = np.nan
    changed = change("10 A grid")
    assert np.flatnonzero(changed.mask[0]).tolist() == [200, 201] and not changed.mask[1:].any()
    assert np.isfinite(changed.flux).all()


def test_wild_pixels_are_far_off_and_not_masked_and_the_bound_loses_them(script, change, spectra):
    changed = change("five wild pixels")
    off = np.abs(changed.flux - spectra.flux) / 0.01
    assert ((off > 0).sum(axis=1) == 5).all() and off.max() < 101 and off[off > 0].min() > 19
    assert not changed.mask.any()
    assert ((changed.jacobian == 0).all(axis=1).sum(axis=1) == 5).all()


# --------------------------------------------------------------------------------------------------------------- APOGEE


@pytest.fixture(scope="module")
def apogee(script):
    arguments = script.argparse.Namespace(seed=3, split="validation", stars=4, snr=[200.0, 100.0])
    return script.apogee(arguments)


def test_the_rows_of_apogee_have_the_pixels_that_they_name(apogee):
    made = {name: row() for name, row in apogee.rows.items()}
    spectra = {name: observed for name, (observed, _) in made.items()}
    assert {name: one.flux.shape[1] for name, one in spectra.items()} == {
        "7,514 pixels, S/N 200": 7514,
        "7,514 pixels, S/N 100": 7514,
        "without one pixel in each detector": 7511,
        "DR12's 7,214 pixels, the others masked": 7514,
        "DR12's 7,214 pixels, alone in the table": 7214,
        "8,575 pixels, gaps masked": 8575,
        "8,575 pixels, gaps filled": 8575,
        "linear 0.2 A grid": 8316,
        "shifted by half a pixel": 7511,
        "rebinned by five": 605 + 499 + 398,
        "30 % masked": 7514,
        "blue detector alone": 3028,
        "green detector alone": 2495,
        "red detector alone": 1991,
        "30 km/s left in": 7514,
        "air taken for vacuum": 7514,
        "15 wild pixels": 7514,
        "errors 2 times too small": 7514,
    }
    assert [name for name, (_, bound) in made.items() if bound is None] == [
        "30 km/s left in",
        "air taken for vacuum",
        "errors 2 times too small",
    ]
    whole = spectra["7,514 pixels, S/N 200"]
    np.testing.assert_allclose(whole.wavelength[0], Instrument.load("apogee").wavelength)
    masked = {name: int(one.mask[0].sum()) for name, one in spectra.items() if one.mask.any()}
    assert masked == {
        "DR12's 7,214 pixels, the others masked": 300,
        "8,575 pixels, gaps masked": 1061,
        "30 % masked": 2254,
    }
    # The same noise where pixels are the same.
    gaps = spectra["8,575 pixels, gaps masked"]
    np.testing.assert_array_equal(gaps.flux[~gaps.mask], whole.flux.ravel())
    for name, snr in (("7,514 pixels, S/N 200", 200), ("7,514 pixels, S/N 100", 100)):
        one = spectra[name]
        np.testing.assert_allclose(np.median(one.flux / one.error, axis=1), snr, rtol=0.02)
    np.testing.assert_allclose(spectra["errors 2 times too small"].error * 2, whole.error)
    # No grid holds more information: narrower pixels have larger errors.
    for name in ("linear 0.2 A grid", "shifted by half a pixel", "rebinned by five"):
        sums = [(one.error.astype(np.float64) ** -2).sum() for one in (spectra[name], whole)]
        assert sums[0] == pytest.approx(sums[1], rel=0.02), name


def test_shifted_stars_and_air_are_seen_elsewhere_than_the_table_states(apogee):
    whole, moved, air = (
        apogee.rows[name]()[0] for name in ("7,514 pixels, S/N 200", "30 km/s left in", "air taken for vacuum")
    )
    grid = whole.wavelength[0]
    inner = slice(100, 2900)
    for other, line_at in ((moved, grid * (1 + 30 / 299_792.458)), (air, vacuum_to_air(grid))):
        np.testing.assert_allclose(other.wavelength[0], grid)
        expected = np.interp(grid, line_at, whole.flux[0])
        assert np.corrcoef(other.flux[0, inner], expected[inner])[0, 1] > 0.95
        assert np.corrcoef(other.flux[0, inner], whole.flux[0, inner])[0, 1] < 0.6


def test_the_bound_grows_where_pixels_are_lost(script, apogee):
    def bound(name):
        return script.row_bounds(apogee.rows[name]()[1], apogee, ["teff"])["teff"]

    whole = bound("7,514 pixels, S/N 200")
    # Twice the noise: twice the bound, but for the priors.
    assert 1.85 < np.median(bound("7,514 pixels, S/N 100") / whole) < 2.0001
    assert 1.1 < np.median(bound("30 % masked") / whole) < 1.35
    assert np.all(bound("red detector alone") > 1.3 * whole)
    assert np.median(bound("linear 0.2 A grid") / whole) == pytest.approx(1, abs=0.03)


def test_the_two_parts_hold_other_stars(script, apogee):
    test = script.apogee(script.argparse.Namespace(seed=3, split="test", stars=4, snr=[200.0]))
    assert not np.isin(test.truth["teff"], apogee.truth["teff"]).any()


# -------------------------------------------------------------------------------------------------------------- figures


def test_figures_of_a_label_leave_out_stars_without_an_answer(script):
    residual = np.array([1.0, -1.0, 3.0, -3.0, np.nan, 20.0])
    figures = script.label_figures(residual, np.full(6, 2.0))
    assert figures["stars"] == 5 and figures["bias"] == 1.0
    assert figures["error_over_sigma"] == pytest.approx(1.4826 * 1.5)
    assert figures["beyond_5_sigma"] == pytest.approx(0.2)
    reference = np.random.default_rng(0).normal(size=500)
    ratio, error = script.scatter_ratio(2 * reference, reference, 0)
    assert ratio == pytest.approx(2) and error == pytest.approx(0, abs=1e-9)  # the same stars in both
    _, error = script.scatter_ratio(np.random.default_rng(1).normal(size=500), reference, 0)
    assert 0.03 < error < 0.12  # two independent scatters: each known to 1.17 / sqrt(2 * 500)


def test_flags_are_counted_by_star_and_reasons_by_their_first_words(script):
    flags = np.array(["", "wavelength;teff>6000", "wavelength", "no valid pixel: 3 of 4"], dtype=object)
    assert script.flag_shares(flags) == {"wavelength": 0.5, "teff>6000": 0.25, "no valid pixel": 0.25}


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer):
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "tiny")
    TrainingRange({"teff": (5000.0, 5001.0)}, (3360.0, 10_200.0), (20.0, 20.0)).save(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def data(tmp_path):
    """Validation stars only: the test split is not there to be read."""
    random = np.random.default_rng(4)
    n = 30
    flux = random.normal(1, 0.02, (n, len(WAVELENGTH)))
    labels = {"teff": random.uniform(3000, 7000, n), "logg": random.uniform(1, 5, n)}
    labels |= {"fe_h": random.uniform(-1, 0.3, n), "alpha_m": random.uniform(0, 0.3, n)}
    table = pa.table(
        {
            "object_id": [str(i) for i in range(n)],
            "wavelength": pixel_column(np.broadcast_to(WAVELENGTH, flux.shape)),
            "flux": pixel_column(flux),
            "flux_error": pixel_column(np.full(flux.shape, 0.02)),
            "mask": pixel_column(np.zeros(flux.shape, bool)),
            **{name: column.astype("f4") for name, column in labels.items()},
            **{f"{name}_err": np.full(n, 0.01, "f4") for name in labels},
        }
    )
    (tmp_path / "stars" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "stars" / "data" / "validation-00000-of-00001.parquet")
    return tmp_path / "stars"


def test_one_command_makes_the_table_and_files_of_it(run_script, checkpoint, data, tmp_path):
    output = tmp_path / "robustness.json"
    arguments = ("--model", checkpoint, "--data", data, "--stars", 8, "--output", output)
    code, printed, error = run_script("paper/evaluate_robustness.py", *arguments)
    assert code == 0, error
    report = json.loads(output.read_text())
    assert report["split"] == "validation" and list(report["results"]) == ["gaia-xp"]  # as it was trained on
    result = report["results"]["gaia-xp"]
    assert list(result["rows"]) == XP_ROWS and result["labels"] == list(LABELS) and result["stars"] == 8
    assert result["rows"]["30 % masked"]["masked"] == pytest.approx(103 / 343)
    assert result["rows"]["whole"]["labels"]["teff"]["ratio"] == 1
    for name, row in result["rows"].items():
        bound = row["labels"]["fe_h"]["bound_ratio"]
        assert (1.02 < bound < 1.6) if name == "30 % masked" else (0.97 < bound < 1.2), (name, bound)
    # Flags are those of the training range of the checkpoint, in which no star is.
    assert result["rows"]["whole"]["flagged"] == 1
    assert sum(share for flag, share in result["rows"]["whole"]["flags"].items() if flag.startswith("teff")) == 1
    assert output.with_suffix(".md").read_text().strip() in printed
    assert "| five wild pixels " in printed and "flags: share of stars" in printed
    again, _, _ = run_script("paper/evaluate_robustness.py", *arguments)
    assert again == 0 and json.loads(output.read_text()) == report


def test_test_stars_are_read_only_on_request(run_script, checkpoint, data):
    arguments = ("--model", checkpoint, "--data", data, "--stars", 8, "--split", "test")
    code, _, error = run_script("paper/evaluate_robustness.py", *arguments)
    assert code == 2 and "data: expected files" in error and "test-*.parquet" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such"], "checkpoint: expected one of the bundled"),
        (["--split", "train"], "argument --split: invalid choice: 'train'"),
        (["--stars", "1"], "stars: expected at least 2, got 1"),
        (["--output", "table.txt"], "output: expected a name that ends in .json, got table.txt"),
        (["--output", "nowhere/table.json"], "output: expected a folder that exists, got nowhere"),
        (["--labels", "age"], "age"),
        (["--inputs", "apogee", "--snr", "0"], "snr: expected positive numbers, got 0.0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_script, arguments, message):
    code, printed, error = run_script("paper/evaluate_robustness.py", *arguments)
    assert code == 2 and printed == ""
    assert len(error.strip().splitlines()) == 1 and message in error
