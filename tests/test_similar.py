"""Neighbours: against a plain search, on files that are whole, and nearer in label than chance."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_model

from spectrafm_cli import DEMO_STARS
from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import batched, read_spectra
from spectrafm_hf.similar import (
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
    embedder = Embedder(*load_checkpoint("spectrafm-gaia-xp-small"))
    return Embeddings.join([embedder(rows)[0] for rows in batched(read_spectra([DEMO_STARS]), 20)])


def made_up(n: int, seed: int, prefix: str = "star") -> Embeddings:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(n, 8)).astype(np.float32)
    return Embeddings([f"{prefix}-{i}" for i in range(n)], vectors, {"teff": vectors[:, 0].copy()})


def test_a_vector_does_not_depend_on_the_batch(tiny_model, tiny_tokenizer, stars):
    embedder = Embedder(tiny_model, tiny_tokenizer)
    together, bad = embedder(stars)
    assert bad == {}
    assert together.vectors.shape == (5, embedder.width) == (5, 4 * 16)
    alone, _ = embedder(stars[2:3])
    np.testing.assert_allclose(together.vectors[2], alone.vectors[0], rtol=1e-4, atol=1e-5)


def test_a_star_that_cannot_be_used_is_told_and_left_out(tiny_model, tiny_tokenizer, stars):
    part, bad = Embedder(tiny_model, tiny_tokenizer)([stars[0], {**stars[1], "mask": np.ones(57, bool)}])
    assert part.object_id == ["star-0"]
    assert bad == {1: "no valid pixel"}
    nothing, bad = Embedder(tiny_model, tiny_tokenizer)([{**stars[1], "mask": np.ones(57, bool)}])
    assert (nothing.object_id, nothing.vectors.shape, set(bad)) == ([], (0, 64), {0})


def test_neighbours_are_those_of_a_plain_search():
    queries, others = made_up(300, 0, "query"), made_up(500, 1)
    index, similarity = neighbours(queries, others, 7)
    a, b = (part.vectors / np.linalg.norm(part.vectors, axis=1)[:, None] for part in (queries, others))
    cosine = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_array_equal(index, np.argsort(-cosine, axis=1)[:, :7])
    np.testing.assert_allclose(similarity, -np.sort(-cosine, axis=1)[:, :7], atol=1e-5)


def test_a_star_is_not_its_own_neighbour_and_what_is_missing_is_minus_one():
    stars = made_up(4, 2)
    index, similarity = neighbours(stars, stars, 5)
    assert all(set(row[:3]) == {0, 1, 2, 3} - {i} for i, row in enumerate(index.tolist()))
    assert (index[:, 3:] == -1).all()
    assert np.isnan(similarity[:, 3:]).all()


def test_label_distance_is_zero_for_twins_and_that_of_chance_for_strangers():
    stars = made_up(2000, 3)
    twins = Embeddings([f"twin-{i}" for i in range(2000)], stars.vectors, stars.labels)
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
    unknown = Embeddings(stars.object_id, stars.vectors, {"teff": np.full(10, np.nan, np.float32)})
    assert label_distance(stars, unknown, index, ["teff"]) is None


def test_neighbours_of_real_stars_are_alike(demo):
    index, _ = neighbours(demo, demo, 3)
    near, random = label_distance(demo, demo, index, ["teff", "logg", "fe_h", "alpha_m"])
    assert near < 0.6 * random  # 64 stars are few; of 3,933 it is 0.28


def test_embeddings_come_back_from_their_file(tmp_path, tiny_model, stars):
    first, second = made_up(3, 6), made_up(2, 7, "other")
    path = tmp_path / "embeddings.parquet"
    with EmbeddingWriter(path, tiny_model) as writer:
        writer.write(first)
        writer.write(second)
    back = read_embeddings(path, tiny_model)
    expected = Embeddings.join([first, second])
    assert back.object_id == expected.object_id
    np.testing.assert_array_equal(back.vectors, expected.vectors)
    np.testing.assert_array_equal(back.labels["teff"], expected.labels["teff"])
    assert [file.name for file in tmp_path.iterdir()] == ["embeddings.parquet"]
    assert pq.read_schema(path).names == ["object_id", "embedding", "teff"]


def test_two_writers_of_one_file_do_not_meet_though_their_process_numbers_are_the_same(tmp_path, tiny_model):
    path = tmp_path / "embeddings.parquet"
    with EmbeddingWriter(path, tiny_model) as one:
        one.write(made_up(3, 6))
        with EmbeddingWriter(path, tiny_model) as other:
            other.write(made_up(2, 7))
        assert len(read_embeddings(path, tiny_model).object_id) == 2
    assert len(read_embeddings(path, tiny_model).object_id) == 3


def test_embeddings_of_another_model_are_a_clear_error(tmp_path, tiny_model):
    path = tmp_path / "embeddings.parquet"
    with EmbeddingWriter(path, tiny_model) as writer:
        writer.write(made_up(3, 6))
    other = make_tiny_model(seed=1)
    assert fingerprint(other) != fingerprint(tiny_model) == fingerprint(make_tiny_model(seed=0))
    with pytest.raises(ValueError, match="expected embeddings of this model"):
        read_embeddings(path, other)


def test_a_file_of_spectra_is_none_of_embeddings(tiny_model):
    assert read_embeddings(DEMO_STARS, tiny_model) is None


def test_an_error_leaves_no_file(tmp_path, tiny_model):
    with pytest.raises(KeyError), EmbeddingWriter(tmp_path / "embeddings.parquet", tiny_model) as writer:
        writer.write(made_up(3, 6))
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["embeddings.csv", "nowhere/embeddings.parquet"])
def test_a_file_that_cannot_be_is_a_clear_error(tmp_path, tiny_model, name):
    with pytest.raises(ValueError, match="^output: expected"):
        EmbeddingWriter(tmp_path / name, tiny_model)
