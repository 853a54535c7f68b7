"""Several sources as one data set to train on."""

import numpy as np
import pytest
from datasets import Dataset

from spectrafm_hf.data.mixture import HostedStars, Mixture
from spectrafm_hf.synthesis.synthetic import SyntheticStars


@pytest.fixture(scope="module")
def sources():
    hosted = Dataset.from_dict({"flux": [[float(i)] * 5 for i in range(50)], "teff": [float(i) for i in range(50)]})
    return [HostedStars(hosted), SyntheticStars("gaia-xp")]


def test_a_batch_comes_from_one_source_and_each_as_often_as_its_share(sources):
    mixture = Mixture(sources, [3, 1], 10_000, seed=0)
    sizes = [mixture.__getitems__([i, 7])["flux"].shape for i in range(200)]
    assert set(sizes) == {(2, 5), (2, 343)}
    assert 0.65 < np.mean([size == (2, 5) for size in sizes]) < 0.85


def test_a_batch_follows_from_the_seed_and_its_first_index(sources):
    batches = [
        Mixture(sources, [0, 1], 10_000, seed).__getitems__([i, 5, 9])["flux"]
        for seed, i in ((0, 3), (0, 3), (0, 4), (1, 3))
    ]
    np.testing.assert_array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2]) and not np.array_equal(batches[0], batches[3])


def test_shares_that_make_no_sense_are_named(sources):
    for shares in ([1], [1, -1], [0, 0]):
        with pytest.raises(ValueError, match="shares: expected a positive number for each of 2 sources"):
            Mixture(sources, shares, 10, 0)
