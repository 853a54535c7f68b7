"""A data set goes to a hub and comes back: the real client against a hub on localhost."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hub_server import Hub, serve
from test_miles import write_wheel

from spectrafm_hf.data.building import Card, push_dataset, write_dataset
from spectrafm_hf.data.schema import pixel_column, spectrum_features


FEATURES = spectrum_features(["teff"])
CARD = Card(title="Stars", description="Some.", command="none", license="cc0-1.0", source="Made up.")


def build(out: Path, **sizes: int) -> Path:
    def table(split: str, n: int) -> pa.Table:
        flux = np.random.default_rng(n).normal(1, 0.1, (n, 30))
        columns = {
            "object_id": [f"{split} {i}" for i in range(n)],
            "survey": ["test"] * n,
            "wavelength": pixel_column(np.broadcast_to(np.arange(5000.0, 5030), flux.shape)),
            "flux": pixel_column(flux),
            "flux_error": pixel_column(np.full_like(flux, 0.1)),
            "mask": pixel_column(flux > 1.1),
        }
        return pa.table(columns | {name: np.arange(n, dtype=np.float32) for name in ("snr", "teff", "teff_err")})

    tables = [(split, table(split, n)) for split, n in sizes.items()]
    settings = {"builder": "test", **sizes}
    return write_dataset(out, tables, features=FEATURES, card=lambda: CARD, settings=settings, shard_rows=10)


PUSH = """
    import sys
    from spectrafm_hf.data.building import push_dataset
    for folder in sys.argv[1:]:
        print(push_dataset(folder, "somebody/stars", private=True))
"""
LOAD = """
    import json, sys
    from datasets import load_dataset
    loaded, streamed = (load_dataset("somebody/stars", streaming=streaming) for streaming in (False, True))
    features = [{split: data[split].features.to_dict() for split in data} for data in (loaded, streamed)]
    rows = [{split: list(data[split]) for split in data} for data in (loaded, streamed)]
    print(json.dumps({"features": features, "rows": rows}))
"""


def in_new_process(hub: Hub, home: Path, script: str, *arguments: object) -> str:
    """The endpoint is read when the library is imported, so a fresh process; without Xet, which is no HTTP."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_localhost", "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**clean, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"},
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_what_is_pushed_is_loaded_and_streamed_from_the_hub_as_it_was_written(tmp_path):
    folder = build(tmp_path / "stars", train=25, test=4)
    with serve() as hub:
        address = in_new_process(hub, tmp_path / "home", PUSH, folder).strip()
        repository = hub.repositories["datasets/somebody/stars"]
        assert address == f"{hub.url}/datasets/somebody/stars/commit/{repository.refs['main']}"
        pushed = repository.commits[repository.refs["main"]]
        here = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert pushed == here
        report = json.loads(in_new_process(hub, tmp_path / "home", LOAD))
    written = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    for features, rows in zip(report["features"], report["rows"], strict=True):
        assert list(rows) == list(features) == ["train", "test"]
        for split in written:
            assert datasets.Features.from_dict(features[split]) == FEATURES
            np.testing.assert_equal(rows[split], written[split].to_list())


def test_a_push_of_fewer_shards_takes_the_old_ones_away_and_leaves_what_others_put_there(tmp_path):
    many, few = build(tmp_path / "many", train=25, test=4), build(tmp_path / "few", train=15)
    with serve() as hub:
        hub.commit_files("datasets/somebody/stars", {"LICENSE": b"free"})
        in_new_process(hub, tmp_path / "home", PUSH, many, few)
        repository = hub.repositories["datasets/somebody/stars"]
        assert len(repository.commits) == 3
        assert sorted(repository.commits[repository.refs["main"]]) == [
            "LICENSE",
            "README.md",
            "build.json",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
        ]


def test_the_command_line_builds_and_pushes(tmp_path):
    wheel = write_wheel(tmp_path / "small.whl")
    command = ["data", "miles", "--source", wheel, "--out", tmp_path / "miles", "--push-to-hub", "somebody/miles"]
    script = "import sys; from spectrafm_cli import main; sys.exit(main(sys.argv[1:]))"
    with serve() as hub:
        printed = in_new_process(hub, tmp_path / "home", script, *command).splitlines()
        repository = hub.repositories["datasets/somebody/miles"]
        commit = repository.refs["main"]
        assert printed[-1] == f"{hub.url}/datasets/somebody/miles/commit/{commit}"
        assert repository.commits[commit]["README.md"] == (tmp_path / "miles" / "README.md").read_bytes()


def test_a_folder_that_holds_no_build_is_not_pushed(tmp_path):
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(ValueError, match="folder: expected a built data set, got "):
        push_dataset(tmp_path, "somebody/stars")
