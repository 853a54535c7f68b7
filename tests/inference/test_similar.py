"""Neighbours: against a plain search, from files, and nearer in labels than random stars."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_tiny_evidence

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import batched, read_spectra
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.inference.similar import (
    EMBEDDED,
    Embedder,
    Embeddings,
    EmbeddingWriter,
    fingerprint,
    label_distance,
    neighbours,
    read_embeddings,
)


@pytest.fixture(scope="module")
def demo() -> Embeddings:
    """The 64 real stars that come with the package, by the bundled model."""
    embedder = Embedder(*load_checkpoint("spectrafm-base"))
    return Embeddings.join([embedder(rows)[0] for rows in batched(read_spectra([DEMO_STARS]), 20)])


RANGE = "4,980-5,140 Å"


def made_up(n: int, seed: int, prefix: str = "star") -> Embeddings:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(n, 8)).astype(np.float32)
    return Embeddings([f"{prefix}-{i}" for i in range(n)], vectors, {"teff": vectors[:, 0].copy()}, RANGE)


def test_a_vector_does_not_depend_on_the_batch(tiny_evidence, stars):
    embedder = Embedder(*tiny_evidence)
    together, bad = embedder(stars)
    assert bad == {}
    assert together.vectors.shape == (5, embedder.width) == (5, 16)
    alone, _ = embedder(stars[2:3])
    np.testing.assert_allclose(together.vectors[2], alone.vectors[0], rtol=1e-3, atol=1e-4)


def test_a_vector_is_the_mean_state_of_the_members(tiny_evidence, stars):
    model, tokenizer = tiny_evidence
    found, _ = Embedder(model, tokenizer)(stars[:1])
    inputs = tokenizer({name: stars[0][name] for name in ("wavelength", "flux", "flux_error", "mask")})
    with torch.no_grad():
        states = model.model(**{name: inputs[name] for name in EMBEDDED}).last_hidden_state
    np.testing.assert_allclose(found.vectors[0], states[0, 0].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_a_star_that_cannot_be_used_is_told_and_left_out(tiny_evidence, stars):
    part, bad = Embedder(*tiny_evidence)([stars[0], {**stars[1], "mask": np.ones(57, bool)}])
    assert part.object_id == ["star-0"]
    assert bad == {1: "no valid pixel"}
    rows = [{**stars[1], "mask": np.ones(57, bool)}, {**stars[2], "refused": "object_class: expected a star, got QSO"}]
    nothing, bad = Embedder(*tiny_evidence)(rows)
    assert (nothing.object_id, nothing.vectors.shape) == ([], (0, 16))
    assert bad == {0: "no valid pixel", 1: "object_class: expected a star, got QSO"}


def h_band(row, seed=0):
    flux = np.random.default_rng(seed).normal(1.0, 0.02, 900)
    wavelength = np.exp(np.log(15_000.0) + 2e-5 * np.arange(900))
    return {**row, "wavelength": wavelength, "flux": flux, "flux_error": np.full(900, 0.02), "mask": flux < 0}


def test_spectra_of_other_wavelengths_are_not_compared(tiny_evidence, stars):
    embedder = Embedder(*tiny_evidence)
    part, bad = embedder([stars[0], h_band(stars[1])])
    assert part.object_id == ["star-0"] and part.range.startswith("4,8")
    assert bad == {1: f"expected a spectrum of {part.range} as the first one, got another"}
    other, bad = Embedder(*tiny_evidence)([h_band(stars[1])])
    assert bad == {} and other.range.startswith("14,9")
    with pytest.raises(ValueError, match="^embeddings: expected spectra with the same wavelengths, got 14,9"):
        neighbours(part, other, 1)
    with pytest.raises(ValueError, match="^embeddings: expected spectra with the same wavelengths"):
        Embeddings.join([part, other])


def test_a_model_whose_tokens_are_pixels_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="^model: expected a checkpoint on evidence to embed"):
        Embedder(tiny_model, tiny_tokenizer)


def test_a_star_with_holes_is_nearest_to_its_complete_spectrum(demo):
    """30 percent of the pixels and a fifth of the range masked: more often than not, among 64 stars."""
    embedder = Embedder(*load_checkpoint("spectrafm-base"))
    random = np.random.default_rng(0)
    rows = []
    for row in read_spectra([DEMO_STARS]):
        first = random.integers(len(row["mask"]) * 4 // 5)
        hole = np.arange(len(row["mask"])) // (len(row["mask"]) // 5 + 1) == first % 5
        rows.append({**row, "mask": row["mask"] | hole | (random.random(len(hole)) < 0.3)})
    found, bad = embedder(rows)
    assert bad == {}
    found = Embeddings([f"{name} with holes" for name in found.object_id], found.vectors, found.labels, found.range)
    index, _ = neighbours(found, demo, 3)
    assert np.mean(index[:, 0] == np.arange(64)) > 0.6
    near, random = label_distance(found, demo, index, ["teff", "logg", "fe_h", "alpha_m"])
    assert near < 0.6 * random


def test_neighbours_are_those_of_a_plain_search():
    queries, others = made_up(300, 0, "query"), made_up(500, 1)
    index, similarity = neighbours(queries, others, 7)
    a, b = (part.vectors / np.linalg.norm(part.vectors, axis=1)[:, None] for part in (queries, others))
    cosine = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_array_equal(index, np.argsort(-cosine, axis=1)[:, :7])
    np.testing.assert_allclose(similarity, -np.sort(-cosine, axis=1)[:, :7], atol=1e-5)


def test_a_star_is_not_its_own_neighbour_and_missing_ones_are_minus_one():
    stars = made_up(4, 2)
    index, similarity = neighbours(stars, stars, 5)
    assert all(set(row[:3]) == {0, 1, 2, 3} - {i} for i, row in enumerate(index.tolist()))
    assert (index[:, 3:] == -1).all()
    assert np.isnan(similarity[:, 3:]).all()


def test_label_distance_is_zero_for_twins_and_that_of_chance_for_strangers():
    stars = made_up(2000, 3)
    twins = Embeddings([f"twin-{i}" for i in range(2000)], stars.vectors, stars.labels, RANGE)
    near, random = label_distance(twins, stars, np.arange(2000)[:, None], ["teff", "logg"])
    assert near == 0.0
    assert random == pytest.approx(2 / np.sqrt(np.pi), rel=0.05)  # |a - b| of two normal numbers
    strangers = np.random.default_rng(4).integers(2000, size=(2000, 3))
    near, random = label_distance(twins, stars, strangers, ["teff"])
    assert near == pytest.approx(random, rel=0.05)


def test_label_distance_is_none_where_no_label_is_known():
    stars = made_up(10, 5)
    index, _ = neighbours(stars, stars, 2)
    assert label_distance(stars, stars, index, ["logg"]) is None
    unknown = Embeddings(stars.object_id, stars.vectors, {"teff": np.full(10, np.nan, np.float32)}, RANGE)
    assert label_distance(stars, unknown, index, ["teff"]) is None


def test_neighbours_of_real_stars_are_alike(demo):
    index, _ = neighbours(demo, demo, 3)
    near, random = label_distance(demo, demo, index, ["teff", "logg", "fe_h", "alpha_m"])
    assert near < 0.6 * random  # 64 stars are few


def test_embeddings_come_back_from_their_file(tmp_path, tiny_evidence, stars):
    first, second = made_up(3, 6), made_up(2, 7, "other")
    path = tmp_path / "embeddings.parquet"
    with EmbeddingWriter(path, tiny_evidence[0]) as writer:
        writer.write(first)
        writer.write(second)
    back = read_embeddings(path, tiny_evidence[0])
    expected = Embeddings.join([first, second])
    assert back.object_id == expected.object_id
    np.testing.assert_array_equal(back.vectors, expected.vectors)
    np.testing.assert_array_equal(back.labels["teff"], expected.labels["teff"])
    assert back.range == RANGE
    assert [file.name for file in tmp_path.iterdir()] == ["embeddings.parquet"]
    assert pq.read_schema(path).names == ["object_id", "embedding", "teff"]


def test_two_writers_of_one_file_do_not_meet_though_their_process_numbers_are_the_same(tmp_path, tiny_evidence):
    path = tmp_path / "embeddings.parquet"
    with EmbeddingWriter(path, tiny_evidence[0]) as one:
        one.write(made_up(3, 6))
        with EmbeddingWriter(path, tiny_evidence[0]) as other:
            other.write(made_up(2, 7))
        assert len(read_embeddings(path, tiny_evidence[0]).object_id) == 2
    assert len(read_embeddings(path, tiny_evidence[0]).object_id) == 3


def test_embeddings_of_another_model_are_a_clear_error(tmp_path, tiny_evidence):
    path = tmp_path / "embeddings.parquet"
    with EmbeddingWriter(path, tiny_evidence[0]) as writer:
        writer.write(made_up(3, 6))
    other = make_tiny_evidence(seed=1)[0]
    assert fingerprint(other) != fingerprint(tiny_evidence[0]) == fingerprint(make_tiny_evidence(seed=0)[0])
    with pytest.raises(ValueError, match="expected embeddings of this model"):
        read_embeddings(path, other)


def test_a_file_of_spectra_is_not_taken_for_embeddings(tiny_evidence):
    assert read_embeddings(DEMO_STARS, tiny_evidence[0]) is None


def test_an_error_leaves_no_file(tmp_path, tiny_evidence):
    with pytest.raises(KeyError), EmbeddingWriter(tmp_path / "embeddings.parquet", tiny_evidence[0]) as writer:
        writer.write(made_up(3, 6))
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["embeddings.csv", "nowhere/embeddings.parquet"])
def test_a_file_that_cannot_be_is_a_clear_error(tmp_path, tiny_evidence, name):
    with pytest.raises(ValueError, match="^output: expected"):
        EmbeddingWriter(tmp_path / name, tiny_evidence[0])
