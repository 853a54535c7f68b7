# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Gaia XP spectra by source id, from the archive's DataLink service, by astroquery (extra `gaia`).

Coefficients are requested, which the archive has for 220 million stars. Answers are cached batch by batch, with the
identifiers that have no spectrum: a second or interrupted run requests only the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import complete_file, one_line
from .labels import read_labels
from .readers import Failure
from .readers.columns import plain
from .readers.gaia_continuous import COLUMNS
from .sources import cache_dir


#: Stars per request: 26 MB. The archive allows 5,000.
BATCH = 1000
ATTEMPTS, DELAY = 3, 5.0  # number of attempts of a request, and seconds before the second one
ARCHIVE = "https://gea.esac.esa.int/"
RELEASE = "Gaia DR3"
ID_COLUMNS = ("sourceid", "gaiadr3sourceid", "dr3sourceid", "gaiaedr3sourceid", "edr3sourceid", "gaiaid", "gaia")
ABSENT = b"spectrafm_hf.absent"
_SCHEMA = pa.schema([("source_id", pa.int64()), *((name, pa.list_(pa.float64())) for name in COLUMNS)])


def read_source_ids(source: Sequence[str | os.PathLike[str]]) -> list[int]:
    """
    Source ids, each once, in their order.

    Parameters
    ----------
    source : sequence of str or path
        Ids; files with one a line; tables (.csv, .ecsv, .fits, .parquet, VOTable) with a column `source_id` or one that
        is called so by a release, or `TABLE:COLUMN`.

    Raises
    ------
    ValueError
        For values that are not ids, and for a column of floating-point numbers, which cannot hold all digits of an id.
    """
    found: list[int] = []
    for each in (os.fspath(name) for name in source):
        found += [int(each)] if each.isdecimal() else _ids_of_file(each)
    if not found:
        raise ValueError("gaia_ids: expected at least one source id, got none")
    return list(dict.fromkeys(found))


def _ids_of_file(source: str) -> list[int]:
    path, column = Path(source), ""
    if not path.is_file():
        name, _, column = source.rpartition(":")
        path = Path(name)
    if not path.is_file():
        raise ValueError(f"gaia_ids: expected a source id, or a table of them, got {source}")
    if path.suffix.lower() in (".txt", ".csv", ".dat", "") and not column:
        with path.open(encoding="utf-8", errors="replace") as lines:
            words = [line.strip().strip('"') for line in lines if line.strip() and not line.startswith("#")]
        # Without a heading, or with one of their own.
        bare = words[1:] if words and plain(words[0]) in ID_COLUMNS else words
        if bare and all(re.fullmatch(r"(Gaia E?DR3 )?\d+", word) for word in bare):
            return [int(word.rpartition(" ")[2]) for word in bare]
    table = read_labels(path)
    known = [name for name in table.column_names if plain(name) in ID_COLUMNS]
    wanted = [name for name in table.column_names if name.lower() == column.lower()] if column else known
    if not wanted:
        names = ", ".join(table.column_names[:20])
        raise ValueError(
            f"gaia_ids: expected {column or 'source_id'} among the columns of {path}, got {names}; name it with "
            f"{path}:COLUMN"
        )
    values = table[wanted[0]]
    if pa.types.is_floating(values.type):
        raise ValueError(
            f"gaia_ids: expected whole numbers in {wanted[0]} of {path}, got {values.type}, which does not hold the 19 "
            "digits of a source id; write the table with integers or text"
        )
    texts = [str(value).strip().rpartition(" ")[2] for value in values.drop_null().to_pylist()]
    if wrong := next((text for text in texts if not text.isdecimal()), None):
        raise ValueError(f"gaia_ids: expected source ids in {wanted[0]} of {path}, got {wrong!r}")
    return [int(text) for text in texts]


class GaiaArchive:
    """
    What the cache holds of the archive, and the archive itself.

    Parameters
    ----------
    server : str, optional
        Default: that of ESA, or `SPECTRAFM_GAIA_ARCHIVE`.
    batch : int
        Stars per request.
    """

    def __init__(self, server: str | None = None, batch: int = BATCH) -> None:
        self.server = server or os.environ.get("SPECTRAFM_GAIA_ARCHIVE") or ARCHIVE
        self.batch = batch
        self.folder = cache_dir() / f"gaia-dr3-xp{'' if self.server == ARCHIVE else '-' + _digest([self.server])}"
        self._client: Any = None

    def files(
        self, identifiers: Sequence[int], failures: list[Failure] | None = None, progress: Any = lambda stars: None
    ) -> list[Path]:
        """
        Parquet files with the coefficients of these stars only; those not in the cache are fetched.

        Parameters
        ----------
        identifiers : sequence of int
        failures : list of Failure, optional
            Gets a line for each identifier without a spectrum.
        progress : callable
            Called with the number of stars of each request.

        Raises
        ------
        OSError
            If the archive does not answer as it should; what came before is kept.
        ImportError
            Without astroquery.
        """
        known, absent = self._known()
        left = [number for number in identifiers if number not in known and number not in absent]
        for start in range(0, len(left), self.batch):
            part = left[start : start + self.batch]
            table = self._ask(part)
            present = table["source_id"].to_pylist()
            missing = sorted(set(part) - set(present))
            path = self.folder / f"{_digest(part)}.parquet"
            _write(table.replace_schema_metadata({ABSENT: json.dumps(missing).encode()}), path)
            known |= dict.fromkeys(present, path)
            absent |= set(missing)
            progress(len(part))
        if failures is not None:
            failures += [
                Failure(Path(f"{RELEASE} {number}"), f"the archive has no XP spectrum of it in {RELEASE}")
                for number in identifiers
                if number not in known
            ]
        return list(self._exactly([number for number in identifiers if number in known], known))

    def _known(self) -> tuple[dict[int, Path], set[int]]:
        """Of the cache: the file of each star, and the identifiers without a spectrum."""
        known: dict[int, Path] = {}
        absent: set[int] = set()
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                with pq.ParquetFile(path) as file:
                    absent |= set(json.loads((file.schema_arrow.metadata or {}).get(ABSENT, b"[]")))
                    known |= dict.fromkeys(file.read(["source_id"])["source_id"].to_pylist(), path)
            except (OSError, ValueError, KeyError):  # damaged: requested again
                path.unlink(missing_ok=True)
        return known, absent

    def _exactly(self, identifiers: Sequence[int], known: dict[int, Path]) -> Iterator[Path]:
        """Files of the cache as they are, or copies of those rows of one that are wanted."""
        wanted: dict[Path, list[int]] = {}
        for number in identifiers:
            wanted.setdefault(known[number], []).append(number)
        for path, numbers in wanted.items():
            with pq.ParquetFile(path) as file:
                whole = file.metadata.num_rows == len(numbers)
            if whole:
                yield path
                continue
            part = self.folder / "parts" / f"{_digest(sorted(numbers))}.parquet"
            if not part.is_file():
                table = pq.read_table(path)
                _write(table.filter(pc.is_in(table["source_id"], pa.array(numbers, pa.int64()))), part)
            yield part

    def _ask(self, identifiers: Sequence[int]) -> pa.Table:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(DELAY * attempt)
            try:
                return self._ask_once(identifiers)
            # A dropped connection, an error page, an answer that is cut off: http.client, requests, zipfile, astropy.
            except Exception as error:
                cause = error
                if isinstance(error, ImportError):
                    raise
        raise OSError(
            f"{self.server}: expected XP spectra of {len(identifiers)} stars, from {identifiers[0]}, got "
            f"{one_line(cause) or type(cause).__name__} ({ATTEMPTS} times); the same command resumes from here"
        ) from cause

    def _ask_once(self, identifiers: Sequence[int]) -> pa.Table:
        # astroquery unpacks what it gets into the working folder, and prints.
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on units of other columns
            with contextlib.redirect_stdout(io.StringIO()):
                if self._client is None:
                    self._client = _client(self.server)
                found = self._client.load_data(
                    identifiers,
                    data_release=RELEASE,
                    data_structure="RAW",
                    retrieval_type="XP_CONTINUOUS",
                    format="fits",
                )
                return _as_table(table for tables in found.values() for table in tables)


def _client(server: str) -> Any:
    try:
        gaia = importlib.import_module("astroquery.gaia")
    except ImportError:
        raise ImportError("Gaia source ids need astroquery: pip install 'spectrafm_hf[gaia]'") from None
    return gaia.GaiaClass(gaia_tap_server=server, gaia_data_server=server, show_server_messages=False)


def _as_table(tables: Iterable[Any]) -> pa.Table:
    """Tables of astropy, which hold no stars where there is no spectrum of any."""
    parts = [_SCHEMA.empty_table()]
    for table in tables:
        names = {name.lower(): name for name in table.colnames}
        if absent := [name for name in _SCHEMA.names if name not in names]:
            raise ValueError(f"{absent[0]}: expected a column of this name from the archive, got {sorted(names)}")
        columns = [pa.array(np.asarray(table[names["source_id"]], np.int64))]
        for name in COLUMNS:
            rows = [np.ma.filled(np.ma.asarray(row, np.float64), np.nan).ravel() for row in table[names[name]]]
            columns.append(pa.array([row if row.size else None for row in rows], pa.list_(pa.float64())))
        parts.append(pa.Table.from_arrays(columns, schema=_SCHEMA))
    return pa.concat_tables(parts)


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as temporary:
        pq.write_table(table, temporary)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:24]
