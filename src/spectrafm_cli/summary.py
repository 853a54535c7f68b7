# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What `spectrafm predict` prints and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DELAY
from .report import PRINTED_STARS, file_name, fitting, heading, print_table, table_row


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Row
    from spectrafm_hf.models import SpectraFMForPrediction, SpectraFMTokenizer


PRINTED_LABELS = 8
PLOTTED_STARS = 20
#: The overview picture holds no more, and no more names are remembered, so that the memory does not grow with the
#: number of stars.
OVERVIEW_STARS = 100_000


class Summary:
    """What is printed and drawn of predictions, however many there are."""

    def __init__(self, names: Sequence[str], units: Mapping[str, str]) -> None:
        self.names, self.units = names, units
        from spectrafm_hf.inference.prediction import Flagged

        self.n_good = self.n_repeated = 0
        self.flagged = Flagged()
        self.table: list[list[str]] = []
        self.reasons = False  # whether the table tells any
        self.stars: list[tuple[Row, dict[str, Any]]] = []
        self.overview: list[dict[str, Any]] = []
        self._seen: set[int] = set()

    def add(self, batch: Sequence[Row], prediction: Mapping[str, Any]) -> list[int]:
        """Count a batch; which of its stars could not be predicted."""
        import numpy as np

        failed = prediction["reason"] != ""
        for i in range(min(len(batch), PRINTED_STARS - len(self.table))):
            self.reasons = self.reasons or bool(failed[i])
            self.table.append(table_row(prediction, i, self.names[:PRINTED_LABELS], self.units))
        for i in range(min(len(batch), PLOTTED_STARS - len(self.stars))):
            self.stars.append((batch[i], {name: column[i] for name, column in prediction.items()}))
        if self.flagged.stars < OVERVIEW_STARS:
            self.overview.append({name: prediction[name] for name in self.names})
            identifiers = list(map(hash, prediction["object_id"][: OVERVIEW_STARS - self.flagged.stars]))
            self.n_repeated += len(identifiers) - len(set(identifiers) - self._seen)
            self._seen.update(identifiers)
        self.flagged.add(prediction["flags"], prediction["reason"])
        self.n_good += int((~failed).sum())
        return np.flatnonzero(failed).tolist()

    def print(self, output: Path | None) -> None:
        from spectrafm_hf.inference.prediction import FLAG_SEPARATOR

        shown = self.names[:PRINTED_LABELS]
        last = "flags or reason" if self.reasons else "flags"
        header = ["object_id", *(heading(name, self.units) for name in shown), last]
        (header, *rows), left_out = fitting(header, self.table, FLAG_SEPARATOR)
        print_table(header, rows)
        where = f"see {output}" if output else "--output FILE keeps them"
        if more := ", ".join(self.names[len(shown) - len(left_out) :]):
            print(f"and {more}: {where}")
        if any(row[-1] != full[-1] for row, full in zip(rows, self.table, strict=True)):
            print(f"flags and reasons that do not fit: {where}")
        if self.flagged.stars > len(self.table):
            print(f"... {self.flagged.stars - len(self.table):,} more, {where}")
        elif output:
            print(f"written: {output}")
        if self.flagged.flagged:
            print(self.flagged)
        if self.n_repeated:
            where = f", of the first {OVERVIEW_STARS:,}" if self.flagged.stars > OVERVIEW_STARS else ""
            print(f"rows whose object_id came before: {self.n_repeated:,}{where} (rows are in the order of the input)")

    def draw(self, folder: Path, model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer) -> None:
        import numpy as np
        from tqdm.auto import tqdm

        from spectrafm_hf.inference.spectrum import best_fit
        from spectrafm_hf.show.labels import plot_overview
        from spectrafm_hf.show.spectra import plot_star

        folder.mkdir(parents=True, exist_ok=True)
        for number, (row, star) in enumerate(tqdm(self.stars, desc="drawing", unit=" stars", delay=DELAY), start=1):
            values, errors = ({name: float(star[name + suffix]) for name in self.names} for suffix in ("", "_err"))
            picture = folder / f"{number:02d}-{file_name(row['object_id'])}.png"
            fit = None if tokenizer.basis is None or star["reason"] else best_fit(model, tokenizer, row)
            plot_star(picture, row, values, errors, self.units, star["flags"], fit)
        pictures = f"{len(self.stars)} spectra"
        if {"teff", "logg"} <= set(self.names):
            columns = {name: np.concatenate([part[name] for part in self.overview]) for name in self.names}
            plot_overview(
                folder / "overview.png",
                {name: column[:OVERVIEW_STARS] for name, column in columns.items()},
                self.flagged.stars,
            )
            pictures += " and overview.png"
        print(f"drawn in {folder}: {pictures}")
