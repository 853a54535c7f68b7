"""Differences of observed and synthetic stars: planted differences are found."""

import numpy as np
import pytest
from datasets import Dataset

from spectrafm_hf import load_checkpoint
from spectrafm_hf.synthesis.bases import survey_grid
from spectrafm_hf.synthesis.survey_grid import as_seen, likely_labels
from spectrafm_hf.synthesis.survey_observed import BEYOND, FWHM, SNR, LikeObserved, observed_stars


WAVELENGTH = np.arange(4_600.0, 6_400.0, 0.9)
STARS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stars that are synthetic but for one wide line, a hot one, and one without labels."""
    generator = np.random.default_rng(0)
    known = {
        "teff": generator.uniform(4_500, 6_500, STARS),
        "logg": generator.uniform(2, 4.8, STARS),
        "fe_h": generator.uniform(-1, 0.3, STARS),
    }
    grid = survey_grid()
    labels, covered = likely_labels(grid, known)
    flux = as_seen(grid, labels, WAVELENGTH, WAVELENGTH / FWHM)
    flux *= 1.0 - 0.1 * np.exp(-0.5 * ((WAVELENGTH - 5_500.0) / 15.0) ** 2)
    rows = {
        name: list(values[covered]) + [15_000.0 if name == "teff" else 4.0, np.nan] for name, values in known.items()
    }
    flux = np.concatenate([flux, np.ones((2, len(WAVELENGTH)))])
    rows |= {"wavelength": [WAVELENGTH] * len(flux), "flux": list(flux), "mask": list(np.zeros(flux.shape, bool))}
    path = tmp_path_factory.mktemp("miles")
    Dataset.from_dict(rows).to_parquet(path / "train.parquet")
    return path


def test_stars_have_labels_errors_and_a_temperature_in_range(folder):
    stars = observed_stars(folder, "train", np.inf)
    assert np.isfinite(stars["teff"]).all() and stars["teff"].max() == BEYOND
    hot = stars["teff"] == BEYOND
    assert (
        hot.sum() == 1 and stars["teff_err"][hot][0] == pytest.approx(450.0) and stars["teff_err"][~hot].max() == 80.0
    )
    assert len(observed_stars(folder, "train")["teff"]) == len(stars["teff"]) - 1
    np.testing.assert_allclose(stars["flux_error"][hot], 1.0 / SNR, rtol=1e-5)


def test_a_line_that_synthetic_stars_lack_is_found(folder):
    like = LikeObserved(load_checkpoint("spectrafm-base")[1].basis, folder)
    labels = {name: np.full(20, value) for name, value in {"teff": 5_500.0, "logg": 4.0, "fe_h": -0.2}.items()}
    added = like.added(WAVELENGTH, labels, np.random.default_rng(0))
    assert added.shape == (20, len(WAVELENGTH))
    mean = added.mean(axis=0)
    line, beside = np.abs(WAVELENGTH - 5_500.0) < 5.0, np.abs(WAVELENGTH - 5_200.0) < 100.0
    assert mean[line].mean() < -0.03 and np.abs(mean[beside]).mean() < 0.01
