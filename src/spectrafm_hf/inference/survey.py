# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Labels of a survey: a folder of predictions, one file for each shard of the spectra.

Each shard is written atomically, with its inputs in the metadata, and a second run skips finished shards. Several
processes share the shards by number without communication, so they may run on any machines that see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from numpy.typing import NDArray

from ..data.readers import MEASURE, Failure, find_files, read_spectra
from ..files import ask_twice
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from .prediction import Flagged, batches_of, predict_batches
from .similar import fingerprint
from .tables import PredictionWriter
from .training_range import TrainingRange
from .velocities import VELOCITY, at_measured_velocities, settled, velocity_columns


#: Small files in one shard; larger ones, such as the bulk files of Gaia, are shards of their own.
FILES_PER_SHARD = 1000
LARGE_FILE = 2**26  # bytes
#: Prefix of a data set on the hub; `OWNER/NAME` or `OWNER/NAME@REVISION` follows.
HUB = "hf://datasets/"
MADE_OF, FAILURES, FLAGS = (f"spectrafm_hf.{name}".encode() for name in ("made_of", "failures", "flags"))
#: Settings of a configuration that do not change predictions.
NO_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "auto_map", "custom_pipelines")


@dataclass(frozen=True)
class Shard:
    """
    Spectra whose predictions are in one file.

    Attributes
    ----------
    name : str
        Name of that file below the output folder, without its suffix.
    files : tuple of str
        Paths, or names in the repository.
    state : str
        Changes when one of the files does.
    repository, revision : str
        Name and commit of a data set on the hub; empty otherwise.
    """

    name: str
    files: tuple[str, ...]
    state: str
    repository: str = ""
    revision: str = ""


class UnreadableNow(OSError):
    """Some files of a shard could not be read, although they may be intact; a second try may work."""

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__(failures[0].cause)
        self.failures = failures


@dataclass(frozen=True)
class Outcome:
    """
    Result of a shard.

    Attributes
    ----------
    shard : Shard
    written : bool
        Whether its file exists.
    stars : int
        Number of predicted stars.
    failures : list of Failure
        What `ShardPredictor` returns, or why there is no file.
    """

    shard: Shard
    written: bool
    stars: int
    failures: list[Failure]


# -------------------------------------------------------------------------------------------------------------- shards


def list_shards(
    inputs: Sequence[str | os.PathLike[str]], split: str | None = None, failures: list[Failure] | None = None
) -> list[Shard]:
    """
    List the shards of a survey, the same in each process.

    Parameters
    ----------
    inputs : sequence of path or str
        Paths as in `find_files`, and data sets on the hub, `hf://datasets/OWNER/NAME` or
        `hf://datasets/OWNER/NAME@REVISION`. A Parquet file is a shard, as is a file of 64 MiB or more; smaller files
        are grouped by the thousand.
    split : str, optional
        Split of data sets. Default: all.
    failures : list of Failure, optional
        Receives missing files; without it they are an error.

    Raises
    ------
    ValueError
        If two inputs would write the same file; and the errors of `find_files`.
    """
    shards: list[Shard] = []
    for source in inputs:
        if is_on_the_hub(source):
            shards += _on_the_hub(os.fspath(source), split)
        else:
            shards += _in_files(Path(source), split, failures)
    name, times = Counter(shard.name for shard in shards).most_common(1)[0] if shards else ("", 0)
    if times > 1:
        raise ValueError(f"input: expected folders and files of different names, got {times} for {name}.parquet")
    return shards


def is_on_the_hub(name: str | os.PathLike[str]) -> bool:
    """Whether this names a data set on the hub; pathlib may have merged its two slashes."""
    return os.fspath(name).startswith((HUB, HUB.replace("//", "/")))


def _on_the_hub(name: str, split: str | None) -> Iterator[Shard]:
    repository, _, revision = name.partition("datasets/")[2].partition("@")
    try:
        info = HfApi().dataset_info(repository, revision=revision or "main")
        tree = HfApi().list_repo_tree(repository, recursive=True, revision=info.sha, repo_type="dataset")
        files = {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}
    except HfHubHTTPError:
        raise  # its message is clear
    except HTTPError as error:
        raise OSError(f"{name}: the hub cannot be reached or returned an error ({error})") from error
    shards = [path for path in sorted(files) if path.endswith(".parquet") and not path.startswith(".")]
    if split is not None:
        shards = [path for path in shards if PurePosixPath(path).name.startswith(f"{split}-")]
    if not shards:
        what = "Parquet files" if split is None else f"Parquet files {split}-*"
        raise ValueError(f"{name}: expected {what}, got {sorted(files)[:5]}")
    for path in shards:
        out = f"{PurePosixPath(repository).name}/{path.removesuffix('.parquet')}"
        yield Shard(out, (path,), str(files[path]), repository, str(info.sha))


def _in_files(root: Path, split: str | None, failures: list[Failure] | None) -> Iterator[Shard]:
    files = find_files([root], split, failures)
    folder = root if root.is_dir() else root.parent
    own = f"{root.resolve().name}/" if root.is_dir() else ""
    others = []
    for path in files:
        if path.suffix.lower() == ".parquet" or path.stat().st_size >= LARGE_FILE:
            name = path.relative_to(folder).as_posix()
            yield Shard(own + (name[:-8] if name.lower().endswith(".parquet") else name), (str(path),), _state([path]))
        else:
            others.append(path)
    for number, start in enumerate(range(0, len(others), FILES_PER_SHARD)):
        part = others[start : start + FILES_PER_SHARD]
        name = f"{own}files-{number:05d}" if root.is_dir() else root.name
        yield Shard(name, tuple(map(str, part)), _state(part))


def _state(files: Sequence[Path]) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- prediction


def process_number() -> tuple[int, int]:
    """
    Number of this process and of all processes, from RANK and WORLD_SIZE, as set by `accelerate launch` and torchrun.

    Raises
    ------
    ValueError
        If they are not such numbers.
    """
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise ValueError(f"RANK, WORLD_SIZE: expected a number below another, got {texts[0]}, {texts[1]}")
    return int(texts[0]), int(texts[1])


def process_device() -> torch.device:
    """
    The GPU of this process, from LOCAL_RANK, as set by `accelerate launch` and torchrun; the CPU without a GPU.

    More processes than GPUs share them.

    Raises
    ------
    ValueError
        If it is not a number.
    """
    number = os.environ.get("LOCAL_RANK", "0")
    if not number.isdecimal():
        raise ValueError(f"LOCAL_RANK: expected a number, got {number}")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(number) % torch.cuda.device_count())


def named_device(name: str) -> torch.device:
    """
    A device by name: cpu, cuda, cuda:N, or auto for that of this process (`process_device`).

    Raises
    ------
    ValueError
        If it does not exist.
    """
    if name == "auto":
        return process_device()
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = {"cpu": "cpu", "cuda": "cuda:0", **{f"cuda:{number}": f"cuda:{number}" for number in range(found)}}
    if name not in known or (name == "cuda" and not found):
        there = ["auto", "cpu", *(other for other in known if ":" in other)]
        raise ValueError(f"device: expected one of {', '.join(there)}, got {name}")
    return torch.device(known[name])


def describe_device(device: torch.device) -> str:
    """Name and kind of the device."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


class ShardPredictor:
    """
    Predict shards, each into its own file: `predictor(shard)`.

    Parameters
    ----------
    model, tokenizer : SpectraFMForPrediction, SpectraFMTokenizer
    output : path
        Folder; created if missing.
    training_range : TrainingRange, optional
        Flags stars outside this range.
    batch_size : int, optional
        Default: that of `batches_of`.
    reading : mapping
        Arguments of `read_spectra`.
    """

    def __init__(
        self,
        model: SpectraFMForPrediction,
        tokenizer: SpectraFMTokenizer,
        output: str | os.PathLike[str],
        training_range: TrainingRange | None = None,
        batch_size: int | None = None,
        reading: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.training_range = model, tokenizer, training_range
        self.output, self.batch_size, self.reading = Path(output), batch_size, dict(reading or {})
        self.names = list(tokenizer.requests or tokenizer.label_names)
        self.measures = self.reading.get("radial_velocity") == MEASURE
        self.columns = [*self.names, *([VELOCITY] if self.measures else [])]
        # Everything that changes predictions, besides the spectra; the batch size does not.
        config = {name: value for name, value in model.config.to_dict().items() if name not in NO_SETTINGS}
        limits = None if training_range is None else asdict(training_range)
        table = self.reading.get("scalar_table")
        scalars = hashlib.sha256(Path(table).read_bytes()).hexdigest() if table else ""
        settings = [config, tokenizer.to_dict(), limits, self.reading, *([scalars] if table else [])]
        text = json.dumps(settings, sort_keys=True, default=lambda array: array.tolist())
        self._own_state = hashlib.sha256((fingerprint(model) + text).encode()).hexdigest()

    def path(self, shard: Shard) -> Path:
        """Path of the predictions of a shard."""
        return self.output / f"{shard.name}.parquet"

    def is_done(self, shard: Shard) -> bool:
        """Whether the predictions of these spectra by this model exist."""
        return self.failures(shard) is not None

    def failures(self, shard: Shard) -> list[Failure] | None:
        """Failures of a finished shard; None if it is not finished. A truncated file has no footer."""
        try:
            metadata = pq.read_metadata(self.path(shard)).metadata or {}
        except (OSError, pa.ArrowInvalid):
            return None
        if metadata.get(MADE_OF) != self._made_of(shard):
            return None
        return [Failure(Path(file), cause) for file, cause in json.loads(metadata.get(FAILURES, b"[]"))]

    def flagged(self, shard: Shard) -> Flagged:
        """Number of stars with each flag in a finished shard."""
        return Flagged(**json.loads(pq.read_metadata(self.path(shard)).metadata[FLAGS]))

    def _made_of(self, shard: Shard) -> bytes:
        return hashlib.sha256((shard.state + self._own_state).encode()).hexdigest().encode()

    def __call__(self, shard: Shard, progress: Callable[[int], Any] = lambda stars: None) -> list[Failure]:
        """
        Predict a shard and write its file.

        Parameters
        ----------
        progress : callable
            Called with the number of stars of each batch.

        Returns
        -------
        list of Failure
            The files that cannot be read, if there are several files. Each has a row with the reason, as has a star
            that cannot be predicted. They are in the metadata of the output, too.

        Raises
        ------
        ValueError
            If the only file of the shard cannot be read. Nothing of the shard is written then.
        OSError
            If the disk is full, or a file on the hub is not available; nothing is written. `UnreadableNow` if the
            system cannot read one of several files now: a row without labels would be final.
        """
        failures: list[Failure] = []
        path = self.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="spectrafm-") as folder:
            files = [
                ask_twice(
                    partial(
                        hf_hub_download,
                        shard.repository,
                        file,
                        repo_type="dataset",
                        revision=shard.revision,
                        local_dir=folder,
                    )
                )
                if shard.repository
                else file
                for file in shard.files
            ]
            metadata = {MADE_OF: self._made_of(shard)}
            flagged = Flagged()
            with PredictionWriter(path, self.columns, {}, metadata, files=len(files) > 1) as writer:
                rows = read_spectra(
                    files, failures=failures if len(files) > 1 else None, keep_refused=True, **self.reading
                )
                if self.measures:
                    rows = at_measured_velocities(rows, self.model, self.tokenizer)
                else:
                    rows = settled(rows, self.model, self.tokenizer)
                velocities: deque[dict[str, NDArray[np.float32]]] = deque()

                def noted(batches: Iterator[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
                    for batch in batches:
                        velocities.append(velocity_columns(batch) if self.measures else {})
                        yield batch

                batches = noted(batches_of(rows, self.tokenizer, self.batch_size))
                for batch in predict_batches(self.model, self.tokenizer, batches, self.names, self.training_range):
                    batch |= velocities.popleft()
                    writer.write(batch)
                    flagged.add(batch["flags"], batch["reason"])
                    progress(len(batch["flags"]))
                if passing := [failure for failure in failures if failure.may_pass]:
                    raise UnreadableNow(passing)
                writer.note({FLAGS: json.dumps(asdict(flagged)).encode()})
                if failures:
                    writer.write(self._rows_of(failures))
                    text = json.dumps([(os.fspath(failure.file), failure.cause) for failure in failures])
                    writer.note({FAILURES: text.encode()})
        return failures

    def outcome(self, shard: Shard, progress: Callable[[int], Any] = lambda stars: None) -> Outcome:
        """Predict a shard; an error becomes a part of the result, so that other shards continue."""
        counts: list[int] = []

        def count(stars: int) -> None:
            counts.append(stars)
            progress(stars)

        try:
            failures = self(shard, count)
        except UnreadableNow as error:
            return Outcome(shard, False, sum(counts), error.failures)
        except (ValueError, OSError, HTTPError, RuntimeError, MemoryError) as error:
            cause = str(error) or type(error).__name__
            return Outcome(shard, False, sum(counts), [Failure(Path(shard.files[0]), cause)])
        return Outcome(shard, True, sum(counts), failures)

    def _rows_of(self, failures: Sequence[Failure]) -> dict[str, NDArray[Any]]:
        unknown = np.full(len(failures), np.nan, np.float32)
        return {
            **dict.fromkeys(("object_id", "file"), np.array([failure.file.name for failure in failures], dtype=object)),
            **{column: unknown for name in self.columns for column in (name, f"{name}_err")},
            "flags": np.array([""] * len(failures), dtype=object),
            "reason": np.array([" ".join(failure.cause.split()) for failure in failures], dtype=object),
        }
