# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Scalars of stars, such as a colour or a parallax, from a table: joined with spectra as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..files import spectrum_stem
from .labels import FILE_COLUMNS, ID_COLUMNS, LabelIndex, known_numbers, number_columns, read_labels
from .schema import with_errors


class ScalarTable:
    """
    Scalars of a table, by the identifier of a star or the name of a file.

    Parameters
    ----------
    path : path
        As `read_labels` takes it, with one row a star.
    names : sequence of str
        Columns of numbers; errors are in `<name>_err` where they are known.

    Raises
    ------
    ValueError
        For a column that is not there, and a table without identifiers.
    """

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str]) -> None:
        table = read_labels(path)
        numbers = number_columns(table)
        if missing := [name for name in names if name not in numbers]:
            raise ValueError(
                f"scalar_table: expected columns of numbers called {', '.join(missing)} in {path}, got "
                f"{', '.join(numbers) or 'none'}"
            )
        columns = [name for name in with_errors(names) if name in table.column_names]
        self._values = {name: known_numbers(table, name) for name in columns}
        keys = [name for name in (*ID_COLUMNS, *FILE_COLUMNS) if name in table.column_names]
        keys = [name for name in keys if not pa.types.is_floating(table.schema.field(name).type)]
        if not keys:
            expected = ", ".join((*ID_COLUMNS, *FILE_COLUMNS))
            raise ValueError(
                f"scalar_table: expected identifiers in {path}, in one of the columns {expected}, got none"
            )
        self._by_id = [LabelIndex(table.select([key]), key) for key in keys]
        texts = [["" if text is None else spectrum_stem(str(text)) for text in table[key].to_pylist()] for key in keys]
        self._by_file = [LabelIndex(pa.table({"id": column}), "id") for column in texts]

    def of(self, row: Any) -> dict[str, float]:
        """The scalars of a spectrum; NaN where the table has no row for it, or an empty one."""
        name = spectrum_stem(str(row.get("file", "")))
        for indices, key in ((self._by_id, str(row["object_id"])), (self._by_file, name)):
            for index in indices:
                if key and (place := int(index.find([key])[0])) >= 0:
                    return {name: float(values[place]) for name, values in self._values.items()}
        return dict.fromkeys(self._values, np.nan)


def join_scalars(rows: Iterable[Any], names: Sequence[str], path: str | os.PathLike[str]) -> Iterator[Any]:
    """Rows with the scalars of a table; what a spectrum brings itself goes first where it is known."""
    table = ScalarTable(path, names)
    for row in rows:
        own = {name: row[name] for name in with_errors(names) if np.isfinite(row.get(name, np.nan))}
        yield {**row, **table.of(row), **own}
