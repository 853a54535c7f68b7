# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What all builders of data sets share: a folder that is whole or not there, Parquet shards, the card, the hub.

A built folder holds ``data/SPLIT-00000-of-00003.parquet``, ``README.md`` (the card) and ``build.json`` (the settings
that made it). `datasets.load_dataset` loads it as it is, and `spectrafm_hf.hub.upload` puts it on the hub.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData
from tqdm.auto import tqdm

from ..files import complete_file, only_writer, replace_folder, restore_folder
from ..free_text import free_part, free_texts, keep_free_texts
from .schema import LABEL_UNITS, PIXEL_COLUMNS, SCALAR_UNITS, label_names_of, pixel_column, validate_table


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
#: Rows in memory of a streaming reader, and while writing, for each split.
ROW_GROUP_BYTES = 16_000_000


# -------------------------------------------------------------------------------------------------------------- folder


def build_folder(
    out_dir: str | os.PathLike[str],
    settings: Mapping[str, Any],
    fill: Callable[[Path], None],
    *,
    overwrite: bool = False,
) -> Path:
    """Make a folder with the files that `fill` writes; it appears under its name only when all of them are there.

    Until then it is a hidden folder in the parent of `out_dir`. If a run is killed, the next one with the same
    settings gets that folder again, with the Parquet files that were finished, so that `fill` can go on from there.

    Parameters
    ----------
    out_dir : path
        Folder to make.
    settings : mapping
        All settings of the build, with the name of the builder as ``builder``; JSON.
    fill : callable
        Gets the hidden folder, in which there is a folder ``data``.
    overwrite : bool
        Build again where `out_dir` holds a build. What a person wrote into the marked part of its card stays.

    Returns
    -------
    pathlib.Path
        `out_dir`. A complete build that is there already, with the same settings, is kept.

    Raises
    ------
    ValueError
        If `out_dir` holds a build with other settings (without `overwrite`), or something that is not a build at all,
        or if another process is building it.
    """
    target = Path(out_dir).absolute()
    settings = json.loads(json.dumps(settings))  # as they are read back
    restore_folder(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        built = settings_of(target)
        if built is None:
            raise ValueError(f"out_dir: expected a new folder or an earlier build, got other files in {target}")
        differing = [name for name in {**settings, **built} if built.get(name) != settings.get(name)]
        if not overwrite and not differing:
            logger.warning("%s: complete, kept as it is (overwrite=True builds it again)", target)
            return target
        if not overwrite:
            name = differing[0]
            raise ValueError(
                f"out_dir: expected a build with {name}={settings.get(name)!r} in {target}, got {built.get(name)!r}; "
                "overwrite replaces it"
            )

    old_card = target / "README.md"
    card = old_card.read_text(encoding="utf-8") if old_card.is_file() else ""
    free_texts(card)  # before the work, of which it would be the end

    partial = target.with_name(f".{target.name}.partial")
    with only_writer(partial):
        if settings_of(partial) != settings:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            (partial / "data").mkdir()
            (partial / "build.json").write_text(json.dumps(settings, indent=2) + "\n")
        for stale in partial.glob("data/.*"):  # of a run that was killed
            stale.unlink()
        try:
            fill(partial)
        except BaseException:
            if not any(partial.glob("data/*-of-*.parquet")):  # nothing to go on from
                shutil.rmtree(partial, ignore_errors=True)
            raise
        new_card = partial / "README.md"
        if card and new_card.is_file():
            new_card.write_text(keep_free_texts(new_card.read_text(encoding="utf-8"), card), encoding="utf-8")
        replace_folder(target, partial)
    return target


def settings_of(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Settings of the build in a folder; None if there is none."""
    try:
        settings = json.loads(Path(folder, "build.json").read_text())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "builder" in settings else None


# -------------------------------------------------------------------------------------------------------------- shards


class Shard(NamedTuple):
    """A Parquet file of a split: rows `start` to `stop` of it."""

    name: str
    split: str
    number: int
    start: int
    stop: int


def plan_shards(sizes: Mapping[str, int], shard_rows: int) -> list[Shard]:
    """Shards of at most `shard_rows` rows for splits of known sizes; none for an empty split, which would not load."""
    shards = []
    for split, size in sizes.items():
        count = -(-size // shard_rows)
        for k in range(count):
            name = f"{split}-{k:05d}-of-{count:05d}.parquet"
            shards.append(Shard(name, split, k, k * shard_rows, min((k + 1) * shard_rows, size)))
    return shards


@contextlib.contextmanager
def shard_writer(path: str | os.PathLike[str], features: datasets.Features) -> Iterator[Callable[[pa.Table], None]]:
    """Function that appends a table to the Parquet file `path`, which appears when the block ends without an error.

    Tables are validated, and put together or cut into row groups of about `ROW_GROUP_BYTES`, so that memory does not
    depend on how they come. Columns that `features` does not name are left out.
    """
    schema = _stored_schema(features)
    # Noise does not repeat, so dictionaries are no use; byte by byte its exponents compress, and a wavelength grid
    # that is the same in every row is next to nothing.
    floats = [name for name in PIXEL_COLUMNS if name != "mask"]
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "write_statistics": False}
    options |= {"column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in floats}}
    options |= {"use_dictionary": ["survey"]}
    with complete_file(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        held: list[pa.Table] = []

        def flush() -> None:
            if held:
                table = pa.concat_tables(held).combine_chunks()
                held.clear()
                for name in PIXEL_COLUMNS:
                    if pc.list_flatten(table[name]).null_count:
                        raise ValueError(f"{name}: expected a value in every pixel, got null; NaN stands for unknown")
                validate_table(table)
                n_groups = max(1, round(table.nbytes / ROW_GROUP_BYTES))
                writer.write_table(table.cast(schema), row_group_size=-(-len(table) // n_groups) or None)

        def write(table: pa.Table) -> None:
            missing = [name for name in schema.names if name not in table.column_names]
            if missing:
                raise ValueError(f"{missing[0]}: expected a column of this name, got {table.column_names}")
            held.append(table.select(schema.names).cast(features.arrow_schema))
            if sum(part.nbytes for part in held) >= ROW_GROUP_BYTES:
                flush()

        yield write
        flush()


def _stored_schema(features: datasets.Features) -> pa.Schema:
    """Columns without nulls, which `datasets` cannot state, make a Parquet file a third faster to read."""
    schema = features.arrow_schema
    for i, column in enumerate(schema):
        if column.name in PIXEL_COLUMNS:
            pixel = pa.field("element", column.type.value_type, nullable=False)
            schema = schema.set(i, pa.field(column.name, pa.list_(pixel), nullable=False))
    return schema


def write_shard(path: str | os.PathLike[str], tables: Iterable[pa.Table], features: datasets.Features) -> None:
    """Write one Parquet file; see [`shard_writer`]."""
    with shard_writer(path, features) as write:
        for table in tables:
            write(table)


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    shard_rows: int,
    tables: Callable[[Shard], Iterable[pa.Table]],
    features: datasets.Features,
) -> None:
    """Write the shards of splits of known sizes, but for those that an earlier run has finished."""
    if shard_rows < 1:
        raise ValueError(f"shard_rows: expected at least 1, got {shard_rows}")
    for shard in tqdm(plan_shards(sizes, shard_rows), desc="writing spectra", unit="files", delay=2, disable=None):
        if not (folder / "data" / shard.name).exists():
            write_shard(folder / "data" / shard.name, tables(shard), features)


def spectra_table(rows: Sequence[Mapping[str, Any]], features: datasets.Features) -> pa.Table:
    """Table of the rows of a reader; a missing float is NaN, other missing values are null."""
    arrays = []
    for column in features.arrow_schema:
        if column.name in PIXEL_COLUMNS:
            lists = [np.asarray(row[column.name]) for row in rows]
            arrays.append(pixel_column(np.concatenate(lists), [len(values) for values in lists]))
        else:
            missing = np.nan if pa.types.is_floating(column.type) else None
            arrays.append(pa.array([row.get(column.name, missing) for row in rows], column.type, from_pandas=False))
    return pa.Table.from_arrays(arrays, schema=features.arrow_schema)


def write_dataset(
    out_dir: str | os.PathLike[str],
    tables: Iterable[tuple[str, pa.Table]],
    *,
    features: datasets.Features,
    card: Callable[[], Card],
    settings: Mapping[str, Any],
    shard_rows: int = 10_000,
    overwrite: bool = False,
) -> Path:
    """Build a data set from a stream of tables, in memory that does not grow with the number of spectra.

    Parameters
    ----------
    out_dir, settings, overwrite
        See [`build_folder`].
    tables : iterable of (split, pyarrow.Table)
        Rows of the schema, the splits in any order. It is not touched if the data set is there already.
    features : datasets.Features
        See [`spectrum_features`]; further columns of the tables are left out.
    card : callable
        Called when all is written, so that the card can include the counts.
    shard_rows : int
        Largest number of rows of one Parquet file.

    Returns
    -------
    pathlib.Path
        `out_dir`.

    Raises
    ------
    ValueError
        If a table breaks the schema, if there is no row at all, and as [`build_folder`] does.
    """
    if shard_rows < 1:
        raise ValueError(f"shard_rows: expected at least 1, got {shard_rows}")

    def fill(folder: Path) -> None:
        for stale in folder.glob("data/*.parquet"):  # a stream cannot be resumed
            stale.unlink()
        splits: dict[str, _SplitWriter] = {}
        with contextlib.ExitStack() as stack:
            for split, table in tables:
                if split not in splits:
                    splits[split] = stack.enter_context(_SplitWriter(folder / "data", split, features, shard_rows))
                splits[split].write(table)
        if not splits:
            raise ValueError("tables: expected at least one spectrum, got none")
        for writer in splits.values():
            writer.name_files()
        write_card(folder, features, card())

    return build_folder(out_dir, settings, fill, overwrite=overwrite)


class _SplitWriter(contextlib.AbstractContextManager):
    """Cuts one split into shards whose number is not known before the end."""

    def __init__(self, folder: Path, split: str, features: datasets.Features, shard_rows: int):
        self.folder, self.split, self.features, self.shard_rows = folder, split, features, shard_rows
        self.n_rows = 0
        self.shard = contextlib.ExitStack()
        self.append: Callable[[pa.Table], None]

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}.parquet"

    def write(self, table: pa.Table) -> None:
        while len(table):
            number, place = divmod(self.n_rows, self.shard_rows)
            if place == 0:
                self.shard.close()
                self.append = self.shard.enter_context(shard_writer(self._path(number), self.features))
            part = table.slice(0, self.shard_rows - place)
            self.append(part)
            self.n_rows += len(part)
            table = table.slice(len(part))

    def __exit__(self, *error: Any) -> bool | None:
        return self.shard.__exit__(*error)

    def name_files(self) -> None:
        for shard in plan_shards({self.split: self.n_rows}, self.shard_rows):
            self._path(shard.number).rename(self.folder / shard.name)


# ---------------------------------------------------------------------------------------------------------------- card


@dataclass
class Card:
    """Content of a data set card that is not in the files.

    Parameters
    ----------
    title, description : str
        Name, and a paragraph: what, how many.
    command : str
        The command that makes the data set again.
    license : str
        Identifier of the hub, or "other" with `license_name`.
    split : str
        How the spectra were split.
    columns : mapping of str to str
        Unit and meaning of columns, where more is to be said than the schema knows.
    sections : mapping of str to str
        Headings and texts that come before the columns.
    flaws : sequence of str
        Known flaws, a sentence each.
    source, terms : str
        Where the data come from, with checksums; under which terms.
    citations : sequence of str
    tags : sequence of str
        Beyond astronomy, spectra, stars.
    """

    title: str
    description: str
    command: str
    license: str
    source: str
    license_name: str | None = None
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    flaws: Sequence[str] = ()
    terms: str = ""
    citations: Sequence[str] = ()
    tags: Sequence[str] = ()


_MEANINGS = {
    "object_id": "the survey's name of the star",
    "survey": "the survey, or where the spectrum comes from",
    "wavelength": "Angstrom in vacuum, rest frame of the star",
    "flux": "in the survey's own units, or over a continuum",
    "flux_error": "one standard deviation, in the units of `flux`",
    "mask": "True = do not use this pixel",
    "snr": "signal-to-noise ratio of a pixel, as the survey defines it",
}


def write_card(folder: str | os.PathLike[str], features: datasets.Features, card: Card) -> None:
    """Write README.md for the Parquet files in ``data``: the metadata that `load_dataset` reads, and the card."""
    folder = Path(folder)
    info = _describe(folder, features)
    n_rows = sum(split.num_examples for split in info.splits.values())
    metadata = DatasetCardData(
        pretty_name=card.title,
        license=card.license,
        license_name=card.license_name,
        size_categories=[_size_category(n_rows)],
        tags=["astronomy", "spectra", "stars", *card.tags],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in info.splits],
            }
        ],
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(metadata)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {card.title}",
        card.description,
        f"```bash\n{card.command}\n```\n\nmakes it, and counts the figures on this page.",
        '```python\nfrom datasets import load_dataset\n\nspectra = load_dataset("DIR").with_format("numpy")\n```',
        _table(("split", "spectra"), [(split.name, f"{split.num_examples:,}") for split in info.splits.values()]),
        card.split,
        *(f"## {heading}\n\n{text}" for heading, text in card.sections.items()),
        "## Columns\n\nNaN means not known.",
        _table(("column", "type", "unit, meaning"), list(_column_rows(features, card.columns))),
        "## Known flaws\n\n" + "\n".join(f"- {flaw}" for flaw in card.flaws) if card.flaws else "",
        f"## Source\n\n{card.source}",
        free_part("notes"),
        "## Terms and citation" if card.terms or card.citations else "",
        card.terms,
        "\n".join(f"- {citation}" for citation in card.citations),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def split_sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Number of spectra in each split of a built folder."""
    sizes: dict[str, int] = {}
    for path in Path(folder, "data").glob("*.parquet"):
        split = path.name.partition("-")[0]
        sizes[split] = sizes.get(split, 0) + pq.read_metadata(path).num_rows
    return dict(sorted(sizes.items(), key=lambda item: (SPLITS.index(item[0]) if item[0] in SPLITS else 9, item)))


def _describe(folder: Path, features: datasets.Features) -> datasets.DatasetInfo:
    """Splits and sizes, from the metadata of the files."""
    info = datasets.DatasetInfo(features=features, splits=datasets.SplitDict())
    info.dataset_size = info.download_size = 0
    for split, n_rows in split_sizes(folder).items():
        files = sorted(folder.glob(f"data/{split}-*.parquet"))
        parts = [pq.read_metadata(path) for path in files]
        n_bytes = sum(part.row_group(i).total_byte_size for part in parts for i in range(part.num_row_groups))
        info.splits.add(datasets.SplitInfo(name=split, num_bytes=n_bytes, num_examples=n_rows))
        info.dataset_size += n_bytes
        info.download_size += sum(path.stat().st_size for path in files)
    return info


def _column_rows(features: datasets.Features, meanings: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    labels = label_names_of(features)
    for name, feature in features.items():
        label = name.removesuffix("_err")
        known = _MEANINGS | SCALAR_UNITS | LABEL_UNITS
        meaning = meanings.get(name) or known.get(name, "")
        if not meaning and label in labels:
            meaning = f"{LABEL_UNITS.get(label, '')}; one standard deviation of `{label}`".lstrip("; ")
        kind = f"list of {feature.feature.dtype}" if isinstance(feature, datasets.List) else feature.dtype
        yield f"`{name}`", kind, meaning


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _size_category(n_rows: int) -> str:
    """As the hub names them: n<1K, 1K<n<10K, ..."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
    limits = [10**k for k in range(3, 10)]
    for i, limit in enumerate(limits):
        if n_rows < limit:
            return f"{names[i - 1]}<n<{names[i]}" if i else "n<1K"
    return "n>1B"
