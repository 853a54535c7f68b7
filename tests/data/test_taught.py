"""Labels of stars by what trained models say of them."""

import numpy as np
import pytest
import torch

from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data.synthetic import SyntheticStars
from spectrafm_hf.data.taught import TaughtStars


TEACHER = "spectrafm-gaia-xp-small"
LABELS = ["teff", "fe_h"]


@pytest.fixture(scope="module")
def source() -> SyntheticStars:
    return SyntheticStars("gaia-xp")


def test_labels_scatter_around_what_the_teachers_say_by_what_they_say_of_their_errors(source):
    plain = source.draw(600, np.random.default_rng(0))
    taught = TaughtStars(source, [TEACHER, TEACHER], LABELS).draw(600, np.random.default_rng(0))
    np.testing.assert_array_equal(taught["flux"], plain["flux"])
    np.testing.assert_array_equal(taught["logg"], plain["logg"])  # not among the labels
    model, tokenizer = load_checkpoint(TEACHER)
    with torch.inference_mode():
        said = model(**tokenizer({name: plain[name] for name in ("wavelength", "flux", "flux_error", "mask")}))
    for name in LABELS:
        i = tokenizer.requests.index(name) if tokenizer.requests else tokenizer.label_names.index(name)
        z = (taught[name] - said.values[:, i].numpy()) / said.errors[:, i].numpy()
        assert np.median(z) == pytest.approx(0, abs=0.15)
        assert np.median(np.abs(z)) == pytest.approx(0.765, abs=0.12)  # of Student's t with three degrees of freedom
        assert np.isnan(taught[f"{name}_err"]).all() and taught[name].dtype == np.float32
        assert np.median(np.abs(taught[name] - plain[name])) > 0


def test_no_teacher_and_a_label_that_one_does_not_know_are_clear_errors(source):
    with pytest.raises(ValueError, match="teachers: expected at least one checkpoint"):
        TaughtStars(source, [], LABELS)
    with pytest.raises(ValueError, match=r"expected names out of .* got \['mg_fe'\]"):
        TaughtStars(source, [TEACHER], ["mg_fe"])
