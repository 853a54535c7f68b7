"""A streamed training set: the star of a draw depends only on its number, and each shard has one reader."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hub_server import serve
from test_upload import in_new_process
from torch.utils.data import BatchSampler

from spectrafm_hf.data import spectrum_features
from spectrafm_hf.data.streaming import CHUNK, StreamedStars, load_streamed
from spectrafm_hf.training.draws import Draws
from spectrafm_hf.training.recipe import Recipe, load_stars


def write(folder: Path, *sizes: int, split: str = "train") -> None:
    """Shards of so many stars, named <shard>-<star>."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pixels = np.linspace(4000, 4100, 6, dtype=np.float32)
    for shard, n in enumerate(sizes):
        rows = {
            "object_id": [f"{shard}-{star}" for star in range(n)],
            "survey": ["test"] * n,
            "wavelength": [pixels] * n,
            "flux": [pixels + star for star in range(n)],
            "flux_error": [np.full(6, 0.01, np.float32)] * n,
            "mask": [np.zeros(6, bool)] * n,
            "snr": [100.0] * n,
            "teff": np.arange(n) + 5000.0,
            "teff_err": np.full(n, 20.0),
        }
        data = Dataset.from_dict(rows, features=spectrum_features(["teff"], []))
        data.to_parquet(folder / "data" / f"{split}-{shard:05d}-of-{len(sizes):05d}.parquet")


@pytest.fixture
def open_stars(tmp_path):
    """`open_stars(*sizes, batch_size=...)`: of shards so large."""

    def make(*sizes: int, batch_size: int, n_stars: int = 0, seed: int = 3) -> StreamedStars:
        if not (tmp_path / "data").exists():
            write(tmp_path, *sizes)
            write(tmp_path, 5, split="validation")
        stars, _ = load_streamed(str(tmp_path), "train", "validation", n_stars, seed)
        stars.set_batch_size(batch_size)
        return stars

    return make


def names(stars: StreamedStars, draws) -> list[str]:
    return list(stars.__getitems__(list(draws))["object_id"])


def test_in_an_epoch_each_star_comes_once_and_in_another_order_than_in_the_next(open_stars):
    stars = open_stars(25, 25, 25, 25, batch_size=20)
    assert len(stars) == 100
    first, second = (names(stars, range(start, start + 100)) for start in (0, 100))
    everything = sorted(f"{shard}-{star}" for shard in range(4) for star in range(25))
    assert sorted(first) == everything and sorted(second) == everything
    assert first != second
    # Five of each shard in a batch.
    for start in range(0, 100, 20):
        assert sorted(name[0] for name in first[start : start + 20]) == sorted("0123" * 5)


def test_columns_are_those_of_the_data_set(open_stars):
    stars = open_stars(9, 7, batch_size=4)
    columns = stars.__getitems__([5, 2])
    assert list(columns["draw"]) == [5, 2]
    assert columns["flux"].shape == (2, 6) and columns["flux"].dtype == np.float32 and columns["mask"].dtype == bool
    number = [int(name.split("-")[1]) for name in columns["object_id"]]
    np.testing.assert_array_equal(columns["flux"][:, 0], 4000.0 + np.array(number))
    np.testing.assert_array_equal(columns["teff"], 5000.0 + np.array(number))


def test_processes_share_the_batches_of_one_and_each_shard_is_read_by_one_of_them(open_stars):
    alone = names(open_stars(*[16] * 8, batch_size=16), range(256))
    for processes in (2, 4):
        parts = []
        for process in range(processes):
            stars, mine = open_stars(batch_size=16), []
            draws = Draws(len(stars))
            batches = BatchSampler(draws, 16 // processes, drop_last=False)
            for epoch in range(2):
                draws.set_epoch(epoch)
                mine += [names(stars, batch) for batch in BatchSamplerShard(batches, processes, process)]
            parts.append(mine)
        together = [sum(batch, []) for batch in zip(*parts, strict=True)]
        assert together == [alone[start : start + 16] for start in range(0, 256, 16)]
        read = [{name.split("-")[0] for batch in mine[:8] for name in batch} for mine in parts]
        assert [len(shards) for shards in read] == [8 // processes] * processes
        assert len(set().union(*read)) == 8


def test_a_resumed_run_continues_with_the_same_stars(open_stars):
    whole = open_stars(30, 30, 30, batch_size=10)
    seen = names(whole, range(180))
    assert names(open_stars(batch_size=10), range(130, 180)) == seen[130:]
    # Back again, too, as at the end of an epoch that is made up to a whole batch.
    assert names(whole, range(40, 50)) == seen[40:50]


def test_shards_of_different_lengths_are_all_used_and_epochs_have_one_length(open_stars):
    stars = open_stars(40, 10, 20, CHUNK + 8, 1, batch_size=60)  # four lanes
    assert len(stars) == (40 + 10 + 20 + CHUNK + 8 + 1) // 60 * 60
    drawn = [names(stars, range(epoch * len(stars), (epoch + 1) * len(stars))) for epoch in range(3)]
    assert {name.split("-")[0] for epoch in drawn for name in epoch} == set("01234")
    assert drawn[0] == names(open_stars(batch_size=60), range(len(stars)))


def test_an_epoch_has_the_requested_number_of_stars(open_stars):
    assert len(open_stars(50, 50, batch_size=8, n_stars=30)) == 24


def test_another_seed_is_another_order(open_stars):
    assert names(open_stars(50, 50, batch_size=8), range(40)) != names(open_stars(batch_size=8, seed=4), range(40))


def test_fewer_stars_than_a_batch_has_are_refused(open_stars):
    with pytest.raises(ValueError, match="batch size: expected at most the 9 stars of an epoch, got 10"):
        open_stars(5, 4, batch_size=10)


def test_data_sets_that_are_not_streamed_are_refused(tmp_path):
    write(tmp_path, 5)
    recipe = Recipe(data=str(tmp_path), streaming=True)
    with pytest.raises(ValueError, match=r"expected Parquet files of \['validation'\], got some of \['train'\]"):
        load_stars(recipe, 0)
    recipe = Recipe(sources={"gaia-xp": 1.0}, streaming=True)
    with pytest.raises(ValueError, match="streaming: expected data without sources, got sources"):
        load_stars(recipe, 0)


HUB_SCRIPT = """
    import json
    from spectrafm_hf.data.streaming import load_streamed
    stars, validation = load_streamed("somebody/stars", "train", "validation", 0, 3)
    stars.set_batch_size(8)
    print(json.dumps([stars.__getitems__(list(range(16)))["object_id"].tolist(), len(stars), len(validation)]))
"""


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_streamed_and_not_kept(open_stars, tmp_path):
    here = open_stars(20, 20, 20, batch_size=8)
    with serve() as hub:
        hub.commit("datasets/somebody/stars", tmp_path)
        found = json.loads(in_new_process(hub, tmp_path / "home", HUB_SCRIPT))
    assert found == [names(here, range(16)), len(here), 5]
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert not [path for path in kept if "train" in path.name]
