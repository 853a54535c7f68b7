"""Writing data sets: atomically, in constant memory, with a card, and loaded back unchanged."""

import logging
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import run_forked
from huggingface_hub import DatasetCard

from spectrafm_hf.data import building
from spectrafm_hf.data.building import Card, build_folder, plan_shards, shard_writer, write_dataset, write_shard
from spectrafm_hf.data.schema import pixel_column, spectrum_features


FEATURES = spectrum_features(["teff", "mg_fe"], ["j"])
CARD = Card(
    title="Stars of a test",
    description="Some stars.",
    command="spectrafm data test --out DIR",
    license="cc0-1.0",
    source="Made up.",
    split="By chance.",
    columns={"flux": "over the median"},
    sections={"Labels": "Drawn."},
    flaws=["None of it is true."],
    citations=["Nobody 2026"],
)


def stars(n: int, first: int = 0, pixels: int = 20) -> pa.Table:
    """Stars whose every number follows from their own."""
    random = [np.random.default_rng(first + i) for i in range(n)]
    flux = np.array([one.normal(1, 0.1, pixels) for one in random], np.float32).reshape(n, pixels)
    flux[:, -1] = np.nan
    columns = {
        "object_id": [f"star {first + i}" for i in range(n)],
        "survey": ["test"] * n,
        "wavelength": pixel_column(np.broadcast_to(np.linspace(5000, 5100, pixels), (n, pixels))),
        "flux": pixel_column(flux),
        "flux_error": pixel_column(np.full((n, pixels), 0.1)),
        "mask": pixel_column(np.isnan(flux)),
        **{name: np.arange(first, first + n, dtype=np.float32) for name in ("snr", "teff", "j")},
        **{name: np.full(n, np.nan, np.float32) for name in ("teff_err", "mg_fe", "mg_fe_err")},
    }
    return pa.table(columns).select(list(FEATURES))


def write(out: Path, tables, **options) -> Path:
    options = {"features": FEATURES, "card": lambda: CARD, "settings": {"builder": "test", "n": 1}, **options}
    return write_dataset(out, tables, **options)


def load(folder: Path, cache: Path, **options):
    return datasets.load_dataset(str(folder), cache_dir=str(cache), **options)


def test_loaded_and_streamed_rows_equal_the_written_ones(tmp_path):
    written = {"train": stars(25), "test": stars(7, 25)}
    out = write(tmp_path / "out", written.items(), shard_rows=10)
    loaded, streamed = load(out, tmp_path / "cache"), load(out, tmp_path / "cache", streaming=True)
    assert list(loaded) == list(streamed) == ["train", "test"]
    for split, table in written.items():
        assert loaded[split].features == streamed[split].features == FEATURES
        np.testing.assert_equal(loaded[split].to_list(), table.to_pylist())
        np.testing.assert_equal(list(streamed[split]), table.to_pylist())


def test_splits_may_come_mixed_and_in_tables_of_any_size(tmp_path):
    everything = stars(30)
    mixed = [("train" if i % 3 else "validation", everything.slice(i, 1)) for i in range(30)]
    out = write(tmp_path / "mixed", mixed, shard_rows=8)
    assert sorted(path.name for path in (out / "data").iterdir()) == [
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "validation-00000-of-00002.parquet",
        "validation-00001-of-00002.parquet",
    ]
    loaded = load(out, tmp_path / "cache")
    assert loaded["validation"]["object_id"][:] == [f"star {i}" for i in range(0, 30, 3)]
    assert loaded["train"]["teff"][:] == [i for i in range(30) if i % 3]


def test_more_columns_than_the_features_are_left_out_and_missing_ones_are_named(tmp_path):
    out = write(tmp_path / "out", [("train", stars(3).append_column("extra", [[1, 2, 3]]))])
    assert pq.read_table(out / "data").column_names == list(FEATURES)
    with pytest.raises(ValueError, match=r"mg_fe: expected a column of this name, got \['object_id'"):
        write(tmp_path / "other", [("train", stars(3).drop_columns("mg_fe"))])


def test_a_row_group_holds_what_a_reader_can_hold_however_the_tables_come(tmp_path, monkeypatch):
    table = stars(400, pixels=100)
    monkeypatch.setattr(building, "ROW_GROUP_BYTES", table.nbytes // 20)
    write_shard(tmp_path / "one.parquet", [table], FEATURES)
    write_shard(tmp_path / "single.parquet", (table.slice(i, 1) for i in range(400)), FEATURES)
    for name in ("one", "single"):
        path = tmp_path / f"{name}.parquet"
        metadata = pq.read_metadata(path)
        assert max(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)) <= 22
        assert metadata.num_row_groups <= 23
        np.testing.assert_equal(pq.read_table(path).to_pylist(), table.to_pylist())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_spectra(tmp_path):
    script = """
        import resource, sys
        sys.path += sys.argv[2:]
        from test_building import Path, stars, write
        for n in (10, 40):  # 26 MB and 104 MB of pixels
            write(Path(sys.argv[1], str(n)), (("train", stars(100, 100 * i, 2000)) for i in range(n)))
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    # A fresh interpreter: a fork has memory to spare, which would hide what is missing.
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), *sys.path]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks = [int(line) * 1024 for line in run.stdout.splitlines()]
    assert peaks[1] - peaks[0] < 40e6


def test_a_table_that_breaks_the_schema_leaves_nothing(tmp_path):
    bad = stars(4).set_column(5, "mask", pixel_column(np.zeros((4, 20), bool)))
    with pytest.raises(ValueError, match=r"flux: expected finite where mask is False, got nan in row 0 "):
        write(tmp_path / "out", [("train", stars(4, 4)), ("test", bad)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="tables: expected at least one spectrum, got none"):
        write(tmp_path / "out", [])
    assert not list(tmp_path.iterdir())


def test_a_null_among_the_pixels_is_refused(tmp_path):
    for position, name in enumerate(("wavelength", "flux", "flux_error", "mask"), start=2):
        lists = stars(2)[name].to_pylist()
        lists[1][3] = None
        bad = stars(2).set_column(position, name, pa.array(lists, stars(2).schema.field(name).type))
        with pytest.raises(ValueError, match=f"{name}: expected a value in every pixel, got null"):
            write(tmp_path / "out", [("train", bad)])
    assert not list(tmp_path.iterdir())


def test_a_failed_stream_leaves_no_shards_for_the_next_run(tmp_path):
    def failing():
        yield "train", stars(25)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write(tmp_path / "out", failing(), shard_rows=5)
    assert not list(tmp_path.iterdir())


def test_a_killed_stream_begins_anew(tmp_path):
    script = """
        import os, signal, sys
        from test_building import Path, stars, write

        def tables():
            yield "train", stars(25)
            os.kill(os.getpid(), signal.SIGKILL)
        write(Path(sys.argv[1]), tables(), shard_rows=5)
    """
    run = run_forked(script, tmp_path / "out")
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(list(tmp_path.glob(".out.partial/data/*.parquet"))) == 4
    out = write(tmp_path / "out", [("train", stars(3))])
    assert pq.read_table(out / "data").num_rows == 3
    assert building.split_sizes(out) == {"train": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_complete_data_set_is_kept_and_its_tables_are_not_made(tmp_path, caplog):
    out = write(tmp_path / "out", [("train", stars(3))])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def tables():
        raise AssertionError("was asked for")
        yield

    with caplog.at_level(logging.WARNING):
        assert write(out, tables()) == out
    assert "complete, kept as it is" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match=r"out_dir: expected a build with n=2 in .*, got 1; overwrite replaces it"):
        write(out, tables(), settings={"builder": "test", "n": 2})
    with pytest.raises(ValueError, match=r"out_dir: expected a build with n=None in .*, got 1; overwrite replaces it"):
        write(out, tables(), settings={"builder": "test"})
    write(out, [("train", stars(5))], settings={"builder": "test", "n": 2}, overwrite=True)
    assert pq.read_table(out / "data").num_rows == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="out_dir: expected a new folder or an earlier build, got other files in"):
            write(tmp_path, [("train", stars(3))], overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_run_is_resumed_only_with_the_same_settings(tmp_path):
    def fill(folder: Path) -> None:
        seen.append(sorted(path.name for path in (folder / "data").iterdir()))
        for number in range(2):
            path = folder / "data" / f"train-0000{number}-of-00002.parquet"
            if number == 1 and failing:
                raise KeyboardInterrupt
            write_shard(path, [stars(2)], FEATURES)

    seen: list[list[str]] = []
    failing = True
    for settings in ({"builder": "test", "n": 1}, {"builder": "test", "n": 1}, {"builder": "test", "n": 2}):
        with pytest.raises(KeyboardInterrupt):
            build_folder(tmp_path / "out", settings, fill)
    assert seen == [[], ["train-00000-of-00002.parquet"], []]
    failing = False
    build_folder(tmp_path / "out", {"builder": "test", "n": 2}, fill)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_are_as_many_as_are_needed_and_an_empty_split_has_none():
    shards = plan_shards({"train": 21, "validation": 0, "test": 10}, 10)
    assert [shard.name for shard in shards] == [
        *(f"train-0000{i}-of-00003.parquet" for i in range(3)),
        "test-00000-of-00001.parquet",
    ]
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 10), (10, 20), (20, 21), (0, 10)]


def test_a_file_appears_when_it_is_complete(tmp_path):
    with pytest.raises(KeyboardInterrupt), shard_writer(tmp_path / "a.parquet", FEATURES) as append:
        append(stars(3))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_card_describes_the_files_and_their_source(tmp_path):
    out = write(tmp_path / "out", [("train", stars(3)), ("test", stars(2, 3))])
    card = DatasetCard.load(out / "README.md")
    assert card.data.pretty_name == "Stars of a test"
    assert card.data.size_categories == ["n<1K"]
    (split, _) = card.data.configs[0]["data_files"]
    assert split == {"split": "train", "path": "data/train-*.parquet"}
    assert [split["num_examples"] for split in card.data.dataset_info["splits"]] == [3, 2]
    for sentence in (
        "| train | 3 |\n| test | 2 |",
        "spectrafm data test --out DIR",
        "## Labels\n\nDrawn.",
        "| `flux` | list of float32 | over the median |",
        "| `teff` | float32 | K |",
        "| `teff_err` | float32 | K; one standard deviation of `teff` |",
        "| `j` | float32 | mag (2MASS, Vega) |",
        "- None of it is true.",
        "- Nobody 2026",
    ):
        assert sentence in card.text
    assert "\n\n\n" not in card.text


@pytest.mark.parametrize(
    ("n", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (128_485, "100K<n<1M"), (10**9, "n>1B")]
)
def test_the_size_is_named_as_the_hub_names_it(n, category):
    assert building._size_category(n) == category
