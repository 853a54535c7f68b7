"""Synthetic data sets and streams, with the emulators that come with the package."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from forked import run_forked
from torch.utils.data import DataLoader

from spectrafm_hf import SpectraFMTokenizer, bundled
from spectrafm_hf.data import gaia_xp
from spectrafm_hf.data.schema import PIXEL_COLUMNS, validate_table
from spectrafm_hf.models import SpectrumEmulator
from spectrafm_hf.synthesis.instruments import INSTRUMENTS, Instrument, instrument_names
from spectrafm_hf.synthesis.synthetic import ALPHA_ELEMENTS, BATCH, LABELS, SyntheticStars
from spectrafm_hf.synthesis.synthetic_data_sets import build_synthetic
from spectrafm_hf.training.collator import SpectraFMCollator
from spectrafm_hf.training.preparation import prepare_model
from spectrafm_hf.training.recipe import Recipe


DEMO = Path(__file__).parents[2] / "src" / "spectrafm_hf" / "resources" / "gaia_xp_demo.parquet"
STARS = 120


def build(out: Path, n: int = STARS, instrument="gaia-xp", **options) -> Path:
    return build_synthetic(out, n, instrument, **{"splits": (80, 10, 10), "shard_rows": 40, **options})


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("built") / "stars")


def load(folder: Path, cache: Path, **options):
    return datasets.load_dataset(str(folder), cache_dir=str(cache), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()}


# -------------------------------------------------------------------------------------------------------------- on disk


def test_a_data_set_loads_in_three_splits_and_streams_the_same(built, tmp_path):
    loaded, streamed = load(built, tmp_path), load(built, tmp_path, streaming=True)
    assert {split: len(loaded[split]) for split in loaded} == {"train": 96, "validation": 12, "test": 12}
    for split in loaded:
        assert loaded[split].features == streamed[split].features
        np.testing.assert_equal(list(streamed[split]), loaded[split].to_list())
    names = [name for split in loaded for name in loaded[split]["object_id"]]
    assert len(set(names)) == STARS


def test_shards_hold_to_the_schema_and_to_their_size(built):
    files = sorted(path.name for path in (built / "data").iterdir())
    assert files == [
        "test-00000-of-00001.parquet",
        *(f"train-0000{i}-of-00003.parquet" for i in range(3)),
        "validation-00000-of-00001.parquet",
    ]
    for path in (built / "data").iterdir():
        table = pq.read_table(path)
        validate_table(table)
        assert len(table) <= 40


def test_a_recipe_for_the_real_spectra_finds_the_same_columns_of_the_same_types(built, tmp_path):
    synthetic, real = load(built, tmp_path)["train"], datasets.Dataset.from_parquet(str(DEMO), cache_dir=str(tmp_path))
    wanted = [*PIXEL_COLUMNS, "object_id", "survey", "snr", "ak_targ"]
    wanted += [name for label in gaia_xp.LABELS for name in (label, f"{label}_err")]
    shared = [name for name in synthetic.features if name in gaia_xp.FEATURES]
    assert sorted(shared) == sorted(wanted)
    assert {name: synthetic.features[name] for name in shared} == {name: gaia_xp.FEATURES[name] for name in shared}
    both = datasets.concatenate_datasets([synthetic.select_columns(shared), real.select_columns(shared)])
    assert len(both) == 96 + 64
    for data in (synthetic, real):
        model, tokenizer, _ = prepare_model(Recipe(), [data.with_format("numpy")[:]])
        batch = SpectraFMCollator(tokenizer, gaia_xp.LABELS)(data.with_format("numpy")[:4])
        assert torch.isfinite(model.eval()(**batch).loss)


def test_labels_lie_within_the_emulator_are_exact_and_alpha_is_their_mean(built, tmp_path):
    stars = load(built, tmp_path)["train"].with_format("numpy")[:]
    config = SpectrumEmulator.from_pretrained(bundled("emulator-optical")).config
    for name, low, high in zip(config.label_names, config.label_minimum, config.label_maximum, strict=True):
        if name not in stars:  # of the 32 labels, the schema has those of an H-band star
            assert name not in LABELS
            continue
        assert low <= stars[name].min() < stars[name].max() <= high
    for name in LABELS:
        assert not stars[f"{name}_err"].any()
    np.testing.assert_allclose(stars["alpha_m"], np.mean([stars[name] for name in ALPHA_ELEMENTS], axis=0), atol=1e-6)


def test_the_spectra_are_those_of_the_labels_with_noise_of_the_size_of_the_errors(tmp_path):
    stars = load(build(tmp_path / "apogee", 60, "apogee", splits=(1, 0, 0)), tmp_path / "cache")["train"]
    stars = stars.with_format("numpy")[:]
    emulator = SpectrumEmulator.from_pretrained(bundled("emulator-hband"))
    wavelength, flux = emulator.synthesize(**{name: stars[name] for name in emulator.config.label_names})
    pixels = np.searchsorted(wavelength, stars["wavelength"][0] - 0.05)
    np.testing.assert_allclose(wavelength[pixels], stars["wavelength"][0], rtol=1e-7)
    deviation = (stars["flux"] - flux[:, pixels]) / stars["flux_error"]
    assert abs(1.4826 * np.median(np.abs(deviation - np.median(deviation))) - 1) < 0.02
    assert np.all(np.abs(1.4826 * np.median(np.abs(deviation), axis=1) - 1) < 0.1), "of every star"


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_stars(built, tmp_path):
    again, other = build(tmp_path / "again"), build(tmp_path / "other", seed=1)
    assert contents(again) == contents(built)
    labels = [
        pq.read_table(folder / "data" / "test-00000-of-00001.parquet")["teff"].to_numpy() for folder in (built, other)
    ]
    assert not np.isin(*labels).any()


def test_more_stars_begin_with_the_same_stars(built, tmp_path):
    longer = build(tmp_path / "longer", 2 * STARS)
    for name in ("train-00000-of-00003.parquet", "train-00001-of-00003.parquet"):
        first, second = (
            pq.read_table(built / "data" / name),
            pq.read_table(longer / "data" / name.replace("3.p", "5.p")),
        )
        assert first.equals(second)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(built, tmp_path):
    assert contents(build(tmp_path / "two", workers=2)) == contents(built)


def killed_at_the_second_shard(out: Path) -> None:
    script = f"""
        import os, pathlib, signal
        from spectrafm_hf.data import building
        from spectrafm_hf.synthesis import synthetic_data_sets

        def die_at_the_second_file(table):
            if list(pathlib.Path({str(out.parent)!r}).rglob("*-of-*.parquet")):
                os.kill(os.getpid(), signal.SIGKILL)
        building.validate_table = die_at_the_second_file
        synthetic_data_sets.build_synthetic({str(out)!r}, {STARS}, "gaia-xp", splits=(80, 10, 10), shard_rows=40)
    """
    run = run_forked(script)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_a_killed_run_loses_one_shard_and_is_resumed(built, tmp_path):
    out = tmp_path / "out"
    killed_at_the_second_shard(out)
    assert not out.exists()
    (finished,) = (tmp_path / ".out.partial" / "data").glob("*-of-*.parquet")
    validate_table(pq.read_table(finished))
    before = finished.stat().st_mtime_ns
    build(out)
    assert (out / "data" / finished.name).stat().st_mtime_ns == before
    assert contents(out) == contents(built)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in built.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_of_a_killed_run_with_other_settings_are_not_used(tmp_path):
    killed_at_the_second_shard(tmp_path / "out")
    build(tmp_path / "out", seed=1)
    assert contents(tmp_path / "out") == contents(build(tmp_path / "fresh", seed=1))


def test_a_complete_build_is_kept_by_default(tmp_path):
    out = build(tmp_path / "out", 20)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert build(out, 20) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match=r"out_dir: expected a build with seed=3 in .*, got 0; overwrite replaces it"):
        build(out, 20, seed=3)
    build(out, 20, seed=3, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert pq.read_table(out / "data" / "test-00000-of-00001.parquet")["object_id"][0].as_py().endswith("-3-test-0-0")


def test_a_folder_with_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="out_dir: expected a new folder or an earlier build, got other files in"):
            build(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_card_describes_how_the_stars_were_made(built):
    card = (built / "README.md").read_text()
    for sentence in (
        "| train | 96 |",
        "spectrafm data synthetic --out DIR --instrument gaia-xp --n 120 --emulator emulator-optical --seed 0 "
        "--shard-rows 40 --splits 80 10 10\n",
        "FWHM that was reached: ",
        "343 pixels, 3,360.0-10,200.0 Angstrom; 0 of them masked",
        "smoothed with a Gaussian of 1.65 pixels",
        "A(V)",
        "A smooth tilt",
    ):
        assert sentence in card, sentence
    spread = float(card.split("flux_error is **")[1].split("**")[0])
    assert abs(spread - 1) < 0.02
    for name in pq.read_schema(next((built / "data").iterdir())).names:
        assert f"| `{name}` |" in card
    assert ".png" not in card


def test_the_card_shows_pictures_of_the_stars_that_a_caller_draws(tmp_path):
    def pictures(folder, labels, stars):
        assert {name: len(column) for name, column in labels.items()} == dict.fromkeys(LABELS, 20)
        assert stars["clean"].shape == stars["flux"].shape == (500, 343)
        (folder / "labels.png").touch()

    out = build(tmp_path / "out", 20, pictures=pictures)
    assert (out / "labels.png").exists()
    assert "![Distribution of the labels](labels.png)" in (out / "README.md").read_text()


def test_the_instrument_file_of_a_data_set_makes_the_same_stars(built, tmp_path):
    own = Instrument.load(built / "instrument.yaml")
    assert contents(build(tmp_path / "own", instrument=own)) == contents(built)


@pytest.mark.parametrize("name", instrument_names())
def test_every_instrument_makes_spectra_of_its_emulator(name, tmp_path):
    table = pq.read_table(build(tmp_path / name, 5, name, splits=(0, 0, 1)) / "data")
    assert set(table["survey"].to_pylist()) == {f"synthetic-{name}"}
    assert len(table["flux"][0]) == len(Instrument.load(name).wavelength)


def test_a_range_selects_stars_and_is_stated_in_the_card(tmp_path):
    out = build(tmp_path / "cool", 20, label_ranges={"teff": (4000, 4200)})
    teff = pq.read_table(out / "data")["teff"].to_numpy()
    assert 4000 <= teff.min() <= teff.max() <= 4200
    assert " --range teff 4000 4200\n" in (out / "README.md").read_text()


def test_bad_input_is_refused_by_name_before_anything_is_written(tmp_path):
    settings = yaml.safe_load((INSTRUMENTS / "miles.yaml").read_text())
    settings["wavelength"] = {"detectors": [{"start": 9000, "step": 1, "last": 2000}]}
    red = Instrument.from_settings(settings)
    cases = [
        ({"n": 0}, "n: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"shard_rows": 0}, "shard_rows: expected at least 1, got 0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"splits": (1, -1, 0)}, r"splits: expected three shares of .*, none negative, got \(1, -1, 0\)"),
        ({"splits": (0, 0, 0)}, r"splits: expected three shares of .* got \(0, 0, 0\)"),
        ({"instrument": "hubble"}, "instrument: expected one of .*, got 'hubble'"),
        (
            {"instrument": red},
            "wavelength: expected a spectrum that covers 9000.0-11000.0 Angstrom for 'miles', got 3301",
        ),
        ({"emulator": "emulator-uv"}, r"emulator: expected one of \['emulator-hband', .*, got 'emulator-uv'"),
        ({"label_ranges": {"p_fe": (0, 1)}}, r"label_ranges: expected labels out of \['teff', .*, got 'p_fe'"),
        ({"label_ranges": {"teff": (4000, 20_000)}}, r"teff: expected a range within .* got 4000 to 20000"),
        ({"label_ranges": {"fe_h": (0.3, -0.3)}}, "fe_h: expected a range within .* got 0.3 to -0.3"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- without a disk


def take(stars, n: int) -> list[dict]:
    rows = iter(stars)
    return [next(rows) for _ in range(n)]


def test_a_stream_has_the_columns_of_the_data_set_and_can_be_tokenized(built, tiny_model):
    stream = SyntheticStars("gaia-xp", seed=2)
    rows = take(stream, 8)
    features = datasets.Features.from_arrow_schema(pq.read_schema(next((built / "data").iterdir())))
    assert list(rows[0]) == list(features) == list(stream.features)
    tokenizer = SpectraFMTokenizer(label_names=["teff", "logg", "fe_h", "alpha_m"])
    batch = SpectraFMCollator(tokenizer, ["teff", "alpha_m"])(rows)
    assert batch["labels"].shape == (8, 2)
    assert torch.isfinite(tiny_model(**batch).loss)


def test_the_same_seed_streams_the_same_stars_and_another_one_others():
    first, again, other = (take(SyntheticStars("gaia-xp", seed=seed), 3) for seed in (2, 2, 3))
    np.testing.assert_equal(first, again)
    assert first[0]["teff"] != other[0]["teff"]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_the_blocks_of_the_stream_among_them(start):
    names = {}
    for workers in (0, 2):
        loader = DataLoader(
            SyntheticStars("gaia-xp"),
            batch_size=BATCH,
            num_workers=workers,
            collate_fn=list,
            multiprocessing_context=start if workers else None,
        )
        batches = iter(loader)
        names[workers] = [row["object_id"] for _ in range(4) for row in next(batches)]
        assert len(set(names[workers])) == 4 * BATCH
    assert set(names[0]) == set(names[2])


@pytest.mark.slow
def test_processes_of_a_distributed_run_share_them_too(tmp_path):
    script = """
        import sys, torch
        from spectrafm_hf.synthesis.synthetic import BATCH, SyntheticStars
        torch.distributed.init_process_group("gloo", f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
        rows = iter(SyntheticStars("gaia-xp"))
        print([next(rows)["object_id"] for _ in range(BATCH + 1)][-1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "meeting")]
    runs = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    assert [run.communicate()[0].strip() for run in runs] == ["synthetic-gaia-xp-0-2-0", "synthetic-gaia-xp-0-3-0"]


def test_a_stream_resumes_from_its_state():
    stream = SyntheticStars("gaia-xp", seed=4)
    rows = take(stream, BATCH)
    state = stream.state_dict()
    following = take(stream, 1)
    resumed = SyntheticStars("gaia-xp", seed=4)
    resumed.load_state_dict(state)
    np.testing.assert_equal(take(resumed, 1), following)
    assert following[0]["object_id"] not in [row["object_id"] for row in rows]
    with pytest.raises(ValueError, match="state: expected one of seed 5, got seed 4"):
        SyntheticStars("gaia-xp", seed=5).load_state_dict(state)
