"""Writing a grid: the files of a run, with spectra from a short fake synthesiser."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from spectrafm_hf.data.schema import validate_table
from spectrafm_hf.synthesis import LABEL_NAMES, Spectrum, draw_labels
from spectrafm_hf.synthesis.grid import GridSettings, write_grid


SETTINGS = GridSettings(
    survey="synthetic-test",
    wavelength_min=5000,
    wavelength_max=5010,
    step=0.5,
    sampling="native",
    loggf_corrections=True,
    spherical_below=1.0,
    shard_size=3,
)
WAVELENGTH = np.arange(5000, 5010, 0.5)


class BlackBodies:
    """Black bodies with one line; none below 4,000 K."""

    def __init__(self, seconds: float = 0.0):
        self.calls, self.seconds = 0, seconds

    def synthesize(self, labels):
        self.calls += 1
        time.sleep(self.seconds)
        if labels["teff"] < 4000:
            raise ValueError(f"teff: expected above 4000, got {labels['teff']:g}")
        continuum = 3.74e27 / WAVELENGTH**5 / np.expm1(1.4388e8 / WAVELENGTH / labels["teff"])
        depth = 0.5 * 10 ** (0.3 * labels["fe_h"])
        return Spectrum(WAVELENGTH, 1 - depth * np.exp(-((WAVELENGTH - 5005) ** 2)), continuum)


def stars(n: int) -> tuple[dict[str, np.ndarray], list[str]]:
    ranges = {"teff": (4010.0, 6700.0), "fe_h": (-1.0, 0.5)}
    return draw_labels(n, np.random.default_rng(0), ranges), [f"star-{i}" for i in range(n)]


def test_a_grid_loads_with_datasets_and_holds_to_the_schema(tmp_path):
    labels, ids = stars(7)
    progress = list(write_grid(tmp_path, labels, ids, BlackBodies(), SETTINGS, processes=2))
    assert progress == [(3, 0), (6, 0), (7, 0)]
    spectra = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert spectra["object_id"] == ids and set(spectra["survey"]) == {"synthetic-test"}
    validate_table(spectra.with_format("arrow")[:])
    row = spectra.with_format("numpy")[4]
    assert row["wavelength"] == pytest.approx(WAVELENGTH)
    assert row["teff"] == pytest.approx(labels["teff"][4]) and row["teff_err"] == 0
    assert np.isnan(row["flux_error"]).all() and not row["mask"].any()
    expected = BlackBodies().synthesize({name: labels[name][4] for name in LABEL_NAMES})
    assert row["flux"] == pytest.approx(expected.flux, rel=1e-6)
    assert row["continuum"] == pytest.approx(expected.continuum, rel=1e-6)


def test_more_labels_become_columns_and_are_part_of_the_plan(tmp_path):
    labels, ids = stars(4)
    labels["eu_fe"] = np.array([0.1, 0.2, 0.3, 0.4])
    settings = replace(SETTINGS, step=4e-6, relative=True)
    list(write_grid(tmp_path, labels, ids, BlackBodies(), settings))
    table = pq.read_table(sorted(tmp_path.glob("data/*.parquet")))
    validate_table(table)
    assert table["eu_fe"].to_pylist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    plan = json.loads((tmp_path / "grid.json").read_text())
    assert plan["eu_fe"] == labels["eu_fe"].tolist() and plan["relative"] is True
    assert "| step | 4e-06 in ln(wavelength) |" in (tmp_path / "README.md").read_text()


def test_a_plan_without_relative_steps_is_that_of_older_grids(tmp_path):
    labels, ids = stars(1)
    list(write_grid(tmp_path, labels, ids, BlackBodies(), SETTINGS))
    plan = json.loads((tmp_path / "grid.json").read_text())
    assert "relative" not in plan
    assert [name for name in plan if name in labels] == list(LABEL_NAMES)


def test_a_star_that_fails_is_left_out_and_its_reason_is_recorded(tmp_path):
    labels, ids = stars(5)
    labels["teff"][[1, 4]] = 3500.0
    assert list(write_grid(tmp_path, labels, ids, BlackBodies(), SETTINGS))[-1] == (5, 2)
    kept = pq.read_table(sorted(tmp_path.glob("data/*.parquet")))
    assert kept["object_id"].to_pylist() == ["star-0", "star-2", "star-3"]
    card = (tmp_path / "README.md").read_text()
    assert "2 of 5." in card and "- `star-4`: teff: expected above 4000, got 3500" in card
    record = json.loads(sorted(tmp_path.glob("records/*.json"))[0].read_text())
    assert record["failed"][0]["object_id"] == "star-1" and record["failed"][0]["logg"] == labels["logg"][1]


def test_a_shard_in_which_all_stars_fail_does_not_keep_the_rest_from_loading(tmp_path):
    labels, ids = stars(6)
    labels["teff"][:3] = 3500.0
    list(write_grid(tmp_path, labels, ids, BlackBodies(), SETTINGS))
    spectra = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert spectra["object_id"] == ids[3:]
    source = BlackBodies()
    list(write_grid(tmp_path, labels, ids, source, SETTINGS))
    assert source.calls == 0  # nor is it tried again


def test_the_card_of_a_grid_without_stars_states_it(tmp_path):
    labels, ids = stars(2)
    labels["teff"][:] = 3500.0
    assert list(write_grid(tmp_path, labels, ids, BlackBodies(), SETTINGS)) == [(2, 2)]
    assert "2 of 2." in (tmp_path / "README.md").read_text()


def test_a_resumed_run_ends_with_the_same_rows(tmp_path):
    labels, ids = stars(8)
    first = BlackBodies()
    run = write_grid(tmp_path / "stopped", labels, ids, first, SETTINGS)
    assert next(run) == (3, 0)
    run.close()
    second = BlackBodies()
    assert list(write_grid(tmp_path / "stopped", labels, ids, second, SETTINGS)) == [(3, 0), (6, 0), (8, 0)]
    assert (first.calls, second.calls) == (3, 5)
    list(write_grid(tmp_path / "whole", labels, ids, BlackBodies(), SETTINGS))
    whole, stopped = (pq.read_table(sorted((tmp_path / name).glob("data/*.parquet"))) for name in ("whole", "stopped"))
    for name in whole.column_names:
        assert np.array_equal(
            np.concatenate(whole[name].to_numpy(), axis=None), np.concatenate(stopped[name].to_numpy(), axis=None)
        ) or name in ("flux_error", "snr")


def test_a_folder_with_another_grid_is_refused_and_stays_as_it_is(tmp_path):
    labels, ids = stars(4)
    list(write_grid(tmp_path, labels, ids, BlackBodies(), SETTINGS))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"step: expected 0.5 as in the grid in .*, got 0.1"):
        list(write_grid(tmp_path, labels, ids, BlackBodies(), replace(SETTINGS, step=0.1)))
    other = {**labels, "fe_h": labels["fe_h"] + 0.1}
    with pytest.raises(ValueError, match=r"fe_h: expected 4 others as in the grid"):
        list(write_grid(tmp_path, other, ids, BlackBodies(), SETTINGS))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_no_shard(tmp_path):
    labels, ids = stars(4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # bytes: enough for the plan, not for a shard
    try:
        with pytest.raises(OSError):
            list(write_grid(tmp_path, labels, ids, BlackBodies(), SETTINGS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["grid.json"]
    assert list(write_grid(tmp_path, labels, ids, BlackBodies(), SETTINGS))[-1] == (4, 0)


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_grid import SETTINGS, BlackBodies, stars, write_grid
labels, ids = stars(30)
for done, failed in write_grid(sys.argv[1], labels, ids, BlackBodies(seconds=0.05), SETTINGS):
    print(done, flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_loses_one_shard_and_leaves_no_incomplete_one(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if int(line) == 9:
                time.sleep(0.08)  # into the fourth shard
                os.kill(run.pid, signal.SIGKILL)
    done = sorted(tmp_path.glob("data/*.parquet"))
    assert 3 <= len(done) <= 4
    recorded = sorted(path.stem for path in tmp_path.glob("records/*.json"))
    assert recorded == [path.stem for path in done][: len(recorded)] and len(done) - len(recorded) <= 1
    assert all(pq.read_table(path).num_rows == 3 for path in done)
    labels, ids = stars(30)
    source = BlackBodies()
    list(write_grid(tmp_path, labels, ids, source, SETTINGS))
    assert source.calls == 30 - 3 * len(recorded)
    assert pq.read_table(sorted(tmp_path.glob("data/*.parquet")))["object_id"].to_pylist() == ids
