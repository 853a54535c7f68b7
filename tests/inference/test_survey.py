"""Surveys are predicted shard by shard: atomically, once, by any number of processes, and resumed."""

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_tiny_model
from hub_server import serve
from test_upload import COMMANDS, build, in_new_process

import spectrafm_cli
from spectrafm_hf import SpectraFMTokenizer, save_checkpoint
from spectrafm_hf.inference.survey import (
    ShardPredictor,
    describe_device,
    list_shards,
    named_device,
    process_device,
    process_number,
)
from spectrafm_hf.inference.tables import ROW_GROUP, PredictionWriter
from spectrafm_hf.inference.training_range import TrainingRange


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def survey(tmp_path) -> Path:
    """Five shards of ten stars and fewer."""
    return build(tmp_path / "survey", train=25, test=12)


@pytest.fixture
def predict(checkpoint, tmp_path, capsys):
    """`predict(*inputs)`: exit code and what was printed, on stdout and stderr."""

    def run(*inputs, output="labels", model=checkpoint):
        command = ["predict", *map(str, inputs), "--model", str(model), "--output", str(tmp_path / output)]
        return spectrafm_cli.main(command), *capsys.readouterr()

    return run


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_shard_gets_a_table_and_together_they_are_those_of_one_run(predict, survey, tmp_path):
    code, out, _ = predict(survey)
    assert code == 0 and "5 of 5 shards" in out
    names = [f"survey/data/{path.name}" for path in sorted((survey / "data").iterdir())]
    assert sorted(written(tmp_path / "labels")) == names
    predict(survey, output="one.parquet")
    together = pd.read_parquet(tmp_path / "labels")
    one = pd.read_parquet(tmp_path / "one.parquet")
    assert len(one) == 37
    pd.testing.assert_frame_equal(together, one, check_exact=False, rtol=1e-5)


def test_each_run_reports_the_number_of_flagged_stars(predict, survey, checkpoint):
    assert "flagged" not in predict(survey)[1]
    TrainingRange({}, (1000.0, 2000.0)).save(checkpoint)
    assert "37 of 37 stars flagged: wavelength (37)\n" in predict(survey, output="again")[1]
    assert "37 of 37 stars flagged: wavelength (37)\n" in predict(survey, output="again")[1]


def test_a_second_run_keeps_finished_shards_and_repairs_the_others(predict, survey, tmp_path):
    predict(survey)
    folder = tmp_path / "labels"
    before = written(folder)
    times = {name: (folder / name).stat().st_mtime_ns for name in before}
    gone, cut = sorted(before)[1:3]
    (folder / gone).unlink()
    (folder / cut).write_bytes(before[cut][:-7])
    code, out, _ = predict(survey)
    assert code == 0 and "3 of them from before" in out
    assert written(folder) == before
    rewritten = {name for name in before if (folder / name).stat().st_mtime_ns != times[name]}
    assert rewritten == {gone, cut}


def test_predictions_of_another_model_or_of_other_spectra_are_not_taken_for_done(predict, survey, tmp_path):
    predict(survey)
    save_checkpoint(make_tiny_model(seed=1), SpectraFMTokenizer(), tmp_path / "other")
    before = pd.read_parquet(tmp_path / "labels")
    assert "0 of them from before" in predict(survey, model=tmp_path / "other")[1]
    assert not np.allclose(pd.read_parquet(tmp_path / "labels")["teff"], before["teff"])

    shard = next((survey / "data").glob("test-*"))
    pq.write_table(pq.read_table(shard).slice(1), shard)
    assert "4 of them from before" in predict(survey, model=tmp_path / "other")[1]
    assert len(pd.read_parquet(tmp_path / "labels")) == 36


def test_predictions_by_other_settings_or_another_training_range_are_not_taken_for_done(
    predict, survey, checkpoint, tmp_path
):
    def column(name):
        return pd.read_parquet(tmp_path / "labels")[name]

    predict(survey)
    before = column("teff_err")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "label_error_factors": [3.0] * 4}))
    assert "0 of them from before" in predict(survey)[1]
    np.testing.assert_allclose(column("teff_err"), 3 * before, rtol=1e-5)
    assert not any(column("flags"))
    TrainingRange({"teff": (0.0, 1.0)}).save(checkpoint)
    assert "0 of them from before" in predict(survey)[1]
    assert set(column("flags")) == {"teff>1"}


def test_who_saved_a_checkpoint_and_where_it_lies_does_not_undo_a_shard(predict, survey, checkpoint, tmp_path):
    predict(survey)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    checkpoint.rename(tmp_path / "elsewhere")
    assert "5 of them from before" in predict(survey, model=tmp_path / "elsewhere")[1]


def test_a_shard_that_cannot_be_read_stops_no_other_and_is_not_taken_for_done(predict, survey, tmp_path):
    shard = next((survey / "data").glob("test-00000*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    code, out, err = predict(survey)
    assert code == 1 and "4 of 5 shards" in out and "_failed.csv" in err and shard.name in err
    assert len(pd.read_parquet(tmp_path / "labels")) == 27
    shard.write_bytes(content)
    code, out, _ = predict(survey)
    assert code == 0 and "5 of 5 shards" in out and "4 of them from before" in out
    assert not (tmp_path / "labels" / "_failed.csv").exists()
    assert len(pd.read_parquet(tmp_path / "labels")) == 37


@pytest.fixture
def small_files(tmp_path) -> Path:
    """A folder with a spectrum in each of three files."""
    folder = tmp_path / "spectra"
    folder.mkdir()
    for star in range(3):
        columns = np.arange(5000.0, 5050), np.linspace(0.9, 1.1, 50), np.full(50, 0.01)
        np.savetxt(folder / f"{star}.csv", np.transpose(columns), delimiter=",", header="wavelength,flux,flux_error",
                   comments="")  # fmt: skip
    return folder


def test_of_many_small_files_one_that_is_broken_has_its_reason_in_the_table(predict, small_files, tmp_path):
    (small_files / "1.csv").write_bytes(b"\x00" * 100)
    code, _, err = predict(small_files)
    table = pd.read_parquet(tmp_path / "labels")
    assert code == 1 and "1.csv" in err
    assert list(table["object_id"]) == ["0", "2", "1.csv"]
    assert "expected a FITS" in table["reason"][2] and np.isnan(table["teff"][2]) and np.isfinite(table["teff"][0])


def test_a_broken_file_is_reported_in_each_run_until_it_is_repaired(predict, small_files, tmp_path):
    content = (small_files / "1.csv").read_bytes()
    (small_files / "1.csv").write_bytes(b"\x00" * 100)
    first, second = predict(small_files), predict(small_files)
    again = second[2].replace(" (in place of that of an earlier run)", "")
    assert first[0] == second[0] == 1 and first[2] == again != second[2] and "1.csv" in again
    assert "1 of 1 shards" in second[1] and "1 of them from before" in second[1]
    assert "1.csv" in (tmp_path / "labels" / "_failed.csv").read_text()
    (small_files / "1.csv").write_bytes(content)
    assert predict(small_files)[0] == 0
    assert not (tmp_path / "labels" / "_failed.csv").exists()
    assert np.isfinite(pd.read_parquet(tmp_path / "labels")["teff"]).all()


def test_a_file_that_the_system_does_not_give_is_tried_again_by_the_next_run(tiny_model, small_files, tmp_path):
    """It is a folder when it is read, and itself again afterwards."""
    predictor = ShardPredictor(tiny_model, SpectraFMTokenizer(), tmp_path / "labels")
    (shard,) = list_shards([small_files])
    file = small_files / "1.csv"
    file.rename(tmp_path / "away")
    file.mkdir()
    outcome = predictor.outcome(shard)
    (failure,) = outcome.failures
    assert not outcome.written and failure.file == file and "Is a directory" in failure.cause
    assert not predictor.is_done(shard) and not written(tmp_path / "labels")
    file.rmdir()
    (tmp_path / "away").rename(file)
    (again,) = list_shards([small_files])
    assert again == shard and predictor.outcome(again).failures == []
    assert len(pd.read_parquet(tmp_path / "labels").dropna()) == 3


def test_each_process_has_shards_of_its_own(predict, survey, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "process 1 of 2: 2 of 2 shards" in predict(survey)[1]
    first = set(written(tmp_path / "labels"))
    monkeypatch.setenv("RANK", "0")
    assert "process 0 of 2: 3 of 3 shards" in predict(survey)[1]
    assert len(first) == 2 and len(pd.read_parquet(tmp_path / "labels")) == 37


@pytest.mark.slow
def test_processes_share_the_shards(survey, checkpoint, tmp_path):
    """Two of `accelerate launch`, real ones: their tables are those of one."""
    config = Path(__file__).parents[2] / "scripts" / "accelerate" / "cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
    command = [*launch, "--main_process_port", "0", "-m", "spectrafm_cli", "predict", survey, "--model", checkpoint]
    run = subprocess.run(
        [*map(str, command), "--output", tmp_path / "two"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "process 0 of 2: 3 of 3 shards" in run.stdout and "process 1 of 2: 2 of 2 shards" in run.stdout
    assert (
        spectrafm_cli.main(["predict", str(survey), "--model", str(checkpoint), "--output", str(tmp_path / "one")]) == 0
    )
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "two"), pd.read_parquet(tmp_path / "one"), check_exact=False, rtol=1e-5
    )


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_read_shard_by_shard_and_not_kept(survey, checkpoint, tmp_path, predict):
    home = tmp_path / "home"
    output = tmp_path / "hub"
    run = ["predict", "hf://datasets/somebody/survey", "--split", "train", "--model", str(checkpoint)]
    with serve() as hub:
        push = ["data", "push", str(survey), "somebody/survey"]
        in_new_process(hub, home, COMMANDS, json.dumps([push, [*run, "--output", str(output)]]))
        fetched = [path for path in hub.downloads() if path.endswith(".parquet")]
        assert len(fetched) == 3
        in_new_process(hub, home, COMMANDS, json.dumps([[*run, "--output", str(output)]]))
        assert len([path for path in hub.downloads() if path.endswith(".parquet")]) == 3
    assert not list(home.rglob("*.parquet"))
    predict(survey, output="here")
    here = pd.read_parquet(tmp_path / "here" / "survey" / "data", filters=None)
    assert len(pd.read_parquet(output)) == 25
    pd.testing.assert_frame_equal(
        pd.read_parquet(output), here[here["object_id"].str.startswith("train")].reset_index(drop=True), rtol=1e-5
    )


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("one", "2"), ("0", "0")])
def test_an_invalid_process_number_is_refused(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE: expected"):
        process_number()


@pytest.mark.parametrize(
    ("rank", "gpus", "expected"),
    [
        (None, 0, "cpu"),
        ("1", 0, "cpu"),
        (None, 2, "cuda:0"),
        ("1", 2, "cuda:1"),
        ("3", 2, "cuda:1"),
        ("3", 1, "cuda:0"),
    ],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, rank, gpus, expected):
    """As far as can be tested without one: what torch says of them is made up, and nothing is sent there."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert process_device() == torch.device(expected)


def test_the_command_line_uses_and_prints_the_device_of_the_process(monkeypatch, checkpoint, capsys):
    monkeypatch.setattr("spectrafm_hf.inference.survey.process_device", lambda: torch.device("meta"))
    for choice, place in (("auto", "meta"), ("cpu", "cpu")):
        model, _ = spectrafm_cli.loading.load(str(checkpoint), device=choice)
        assert model.device == torch.device(place)
        spectrafm_cli.loading.say_device(model)
        assert capsys.readouterr().out == f"device: {place}\n"


def test_a_device_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "gpu", "mps"):
        with pytest.raises(ValueError, match=f"^device: expected one of auto, cpu, got {name}$"):
            named_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    assert [named_device(name) for name in ("cuda", "cuda:1")] == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert describe_device(torch.device("cuda:1")) == "cuda:1 (H200)"
    with pytest.raises(ValueError, match="^device: expected one of auto, cpu, cuda:0, cuda:1, got cuda:2$"):
        named_device("cuda:2")


def test_a_local_rank_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "-1")
    with pytest.raises(ValueError, match="LOCAL_RANK: expected a number, got -1"):
        process_device()


def test_inputs_that_would_write_the_same_file_are_refused(survey, tmp_path):
    other = build(tmp_path / "elsewhere" / "survey", train=25)
    with pytest.raises(ValueError, match=r"input: expected folders and files of different names"):
        list_shards([survey, other], "train")


def test_pictures_are_drawn_of_a_table_only(predict, survey, checkpoint, tmp_path, capsys):
    command = ["predict", str(survey), "--model", str(checkpoint), "--output", str(tmp_path / "labels"), "--plot", "x"]
    assert spectrafm_cli.main(command) == 2
    assert "--plot: expected a table" in capsys.readouterr().err


def test_after_an_error_nothing_of_a_shard_is_left(survey, tiny_model, tmp_path, monkeypatch):
    """The disk is full at the second batch: a real one, of 4 kB, is in tests/faults."""
    predictor = ShardPredictor(tiny_model, SpectraFMTokenizer(), tmp_path / "labels", batch_size=4)
    shard = list_shards([survey], "test")[0]

    def stop(stars):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        predictor(shard, stop)
    assert not [path for path in (tmp_path / "labels").rglob("*") if path.is_file()]
    assert not predictor.is_done(shard)
    predictor(shard)
    assert predictor.is_done(shard)


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError()])
def test_out_of_memory_fails_one_shard_only(survey, tiny_model, tmp_path, error):
    predictor = ShardPredictor(tiny_model, SpectraFMTokenizer(), tmp_path / "labels")
    first, second = list_shards([survey], "test")

    def stop(stars):
        raise error

    outcome = predictor.outcome(first, stop)
    assert not outcome.written and outcome.failures == [(Path(first.files[0]), str(error) or "MemoryError", False)]
    assert predictor.outcome(second).written and not predictor.is_done(first)


def test_ctrl_c_ends_a_survey(survey, tiny_model, tmp_path):
    predictor = ShardPredictor(tiny_model, SpectraFMTokenizer(), tmp_path / "labels")

    def stop(stars):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predictor.outcome(list_shards([survey], "test")[0], stop)


def test_four_times_the_stars_take_no_more_memory(tiny_model, tmp_path, monkeypatch):
    """Of Python and NumPy; that of a whole process is in scripts/benchmarks/test_benchmark_survey.py."""
    monkeypatch.setattr(
        "spectrafm_hf.inference.tables.ROW_GROUP", 256
    )  # what waits to be written: 9 MB of a large shard
    stars = pq.read_table(build(tmp_path / "few", test=10) / "data")
    for name, times in (("small", 40), ("large", 160)):
        pq.write_table(pa.concat_tables([stars] * times), tmp_path / f"{name}.parquet")
    small, large = list_shards([tmp_path / "small.parquet", tmp_path / "large.parquet"])
    predictor = ShardPredictor(tiny_model, SpectraFMTokenizer(), tmp_path / "labels", batch_size=32)
    held: dict[str, list[int]] = {}

    def measure(_):
        batches[0] += 1
        if batches[0] % 5 == 0:
            gc.collect()  # what nobody holds does not count, whenever it would be collected
            held.setdefault(shard.name, []).append(tracemalloc.get_traced_memory()[0])

    predictor(small)  # loads modules
    for shard in (small, large):
        batches = [0]
        tracemalloc.start()
        predictor(shard, measure)
        tracemalloc.stop()
    print(held)  # pytest shows it where the test fails
    assert [len(found) for found in held.values()] == [2, 10]
    # Whoever kept the stars, or their labels, would need four times as much.
    assert max(held["large"]) < 1.5 * max(held["small"])


def test_rows_are_written_in_groups_that_are_quick_to_read(tmp_path):
    batch = {"object_id": np.array(["a"] * 1000, dtype=object), "flags": np.array([""] * 1000, dtype=object)}
    batch["reason"] = batch["flags"]
    batch |= {name: np.zeros(1000, np.float32) for name in ("teff", "teff_err")}
    with PredictionWriter(tmp_path / "many.parquet", ["teff"], {}) as writer:
        for _ in range(150):
            writer.write(batch)
    file = pq.ParquetFile(tmp_path / "many.parquet")
    assert file.metadata.num_rows == 150_000 and file.num_row_groups == -(
        -150_000 // (ROW_GROUP + 1000 - ROW_GROUP % 1000)
    )
