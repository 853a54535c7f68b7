# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning: your spectra and a table of labels -> a checkpoint (`spectrafm finetune`).

Spectra are joined with labels. The states of a frozen checkpoint on evidence are the input of a few Gaussian
processes; cross-validation selects and weights them for each label, see `heads`. They become part of the checkpoint,
with calibrated errors, and are compared with models fitted without it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv

from ..checkpoints import BASE_CHECKPOINT, load_checkpoint, save_checkpoint
from ..data.joining import (
    MIN_STARS,
    UNREADABLE,
    Labels,
    check_labels,
    column_of,
    join_columns,
    read_data_set,
    read_label_table,
    split_stars,
    texts_of,
    with_labels,
    write_json,
)
from ..data.readers import Failure
from ..files import complete_file
from ..hub.cards import checksums, read_evaluations, sha256, write_model_card
from ..inference.prediction import batches_of, predict_batches
from ..inference.states import States, frozen_states
from ..inference.training_range import TrainingRange
from ..inference.velocities import settled
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..statistics import robust_scatter
from .choices import Choice, choose_heads, make_folds
from .components import fit_pixels
from .heads import MOST_STARS
from .metrics import format_table, table_metrics
from .rivals import Sample, ask_rivals, pixels_of, verdict


FOLDS = 5
#: Maximum number of pixels for the rivals: 400 MB, 12,000 APOGEE spectra.
MAX_PIXELS = 100_000_000
TUNED = "fine-tuned"
BY_FOLDS = f"{FOLDS}-fold cross-validation; the checkpoint is fitted to all stars"
BY_STAR = "by the SHA-256 of the identifier of the star, all spectra of a star in one split"

#: Values and errors of each label, arrays of shape (spectra,).
Answers = tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]


# ----------------------------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Tuned:
    """Result of fine-tuning: the `folder` of the checkpoint; `units` by label; the selected `heads` by label; the
    `sizes` of the splits; the number of `dropped` spectra by cause; a line for each label that names the best model
    (`verdicts`); and the content of `evaluation.json`.
    """

    folder: Path
    units: dict[str, str]
    heads: dict[str, str]
    sizes: dict[str, int]
    dropped: dict[str, int]
    verdicts: list[str]
    evaluation: dict[str, Any]

    def summary(self) -> str:
        """The verdicts, and the figures as a table."""
        stars = self.evaluation["stars"]["all stars"]
        split = f"{FOLDS}-fold cross-validation" if "test" not in self.sizes else "test"
        title = f"{split}, {stars:,} spectra: 1.4826 MAD of predicted - true (median, RMSE, error/sigma)"
        table = format_table(self.evaluation["results"]["all stars"], self.units)
        return "\n".join([*self.verdicts, "", title, table])


def finetune(
    files: Sequence[Path],
    labels: Path,
    out: Path,
    *,
    model: str = BASE_CHECKPOINT,
    names: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    scalars: Sequence[str] = (),
    id_column: str | None = None,
    seed: int = 0,
    failures: Sequence[Failure] = (),
    command: str = "spectrafm finetune",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    draw: Callable[..., None] | None = None,
    **reading: Any,
) -> Tuned:
    """
    Fine-tune a checkpoint on evidence to the labels of your spectra, and evaluate it.

    Only predictions of these labels change, for spectra of the same range and resolving power; all others stay
    bit-identical.

    Parameters
    ----------
    files, failures
        As `find_files` returns them.
    labels, names, units, id_column
        See [`read_label_table`] and [`join`].
    scalars : sequence of str
        Columns of the spectra or of the labels that may be additional inputs, such as a colour or a parallax, NaN where
        unknown, with one-sigma errors in `<name>_err`. They are used for labels that they improve in cross-validation;
        the checkpoint then needs them.
    out : path
        Folder for the checkpoint, its card and picture. `out/report` has tables of dropped spectra, splits, compared
        heads and predictions; `out/work` has the data set of the spectra. Neither is pushed to the hub. A failed start
        leaves no new folder.
    model : str
        Checkpoint to start from.
    seed : int
        For the folds and the neural networks in the comparison.
    command : str
        The command line, for the card.
    overwrite : bool
        Start again if `out` holds a fine-tuning with other arguments.
    say : callable
        Prints a line at each stage.
    draw : callable
        Draws `predicted.png`, as `show.plots.plot_given` does; default: no picture.
    **reading
        Arguments of `read_spectra`.

    Raises
    ------
    ValueError
        If labels cannot be used, no spectrum has a label, there are fewer stars than `MIN_STARS`, the checkpoint cannot
        read the spectra, or `out` holds another fine-tuning; and as `load_checkpoint` does.
    """
    base, tokenizer = load_checkpoint(model)
    if tokenizer.basis is None:
        raise ValueError(f"model: expected a checkpoint on evidence, such as {BASE_CHECKPOINT}, got {model}")
    known = dict(zip(base.config.label_names, base.config.label_units, strict=True))
    scalars = list(dict.fromkeys(name.lower() for name in scalars))
    table = read_label_table(labels, names, units, known, scalars)
    if scalars:
        reading["scalars"] = scalars
    join_columns(table.table, id_column)  # fail before the spectra are read, which takes long
    fingerprint = hashlib.sha256(
        json.dumps(
            [[(file.name, sha256(file) if file.is_file() else "") for file in files], reading],
            default=lambda grid: np.asarray(grid).tolist(),
        ).encode()
    ).hexdigest()
    settings = {
        "model": model, "labels": table.units, "table": sha256(labels), "spectra": fingerprint, "id_column": id_column,
        "seed": seed, **({"scalars": scalars} if scalars else {}),
    }  # fmt: skip
    is_new = not out.exists()
    work = _working_folder(out, settings, overwrite)
    if done := json.loads((work / "settings.json").read_text(encoding="utf-8")).get("complete"):
        say(f"{out}: complete, kept as it is")
        return Tuned(out, table.units, **done, evaluation=read_evaluations(out)[0])
    try:
        # Shift to the rest frame as in predictions, if a file does not state its frame.
        at_rest = functools.partial(settled, model=base, tokenizer=tokenizer)
        spectra, dropped = read_data_set(files, work, failures, fingerprint, command, transform=at_rest, **reading)
        run = _Run(out, table, scalars, model, seed, command, say, draw)
        with one_thread():
            complete, evaluation = run(base, tokenizer, spectra, dropped, id_column)
    except ValueError:
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        raise
    write_json(work / "settings.json", {**settings, "complete": complete})
    return Tuned(out, table.units, **complete, evaluation=evaluation)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: many small matrix products are slow with more threads than free cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Run:
    """From spectra on disk to a checkpoint with its card."""

    out: Path
    table: Labels
    scalars: Sequence[str]
    model: str
    seed: int
    command: str
    say: Callable[[str], None]
    draw: Callable[..., None] | None

    def __call__(
        self,
        base: SpectraFMForPrediction,
        tokenizer: SpectraFMTokenizer,
        spectra: Dataset,
        dropped: list[dict[str, str]],
        id_column: str | None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Summary of the complete run, and its evaluation."""
        names, say = list(self.table.units), self.say
        stars, without, joined_by = with_labels(spectra, self.table, id_column, self.scalars)
        dropped += without
        n_labelled = len(set(texts_of(stars, "object_id")))
        say(f"{len(stars):,} spectra of {n_labelled:,} stars have labels (joined by {joined_by})")
        bare, _ = load_checkpoint(self.model)
        rung, states, rows, causes = frozen_states(bare, tokenizer, stars.with_format("numpy"))
        texts = {name: texts_of(stars, name) for name in ("file", "object_id")}
        for i, cause in causes.items():
            dropped.append({**{name: column[i] for name, column in texts.items()}, "cause": cause})
        # Random order, as only the first stars are used if there are many.
        order = np.random.default_rng([self.seed, 7]).permutation(len(rows))
        stars, states = stars.select(rows[order]), states[order]
        if self.scalars:
            columns = [[column_of(stars, f"{name}{end}") for end in ("", "_err")] for name in self.scalars]
            states = replace(states, scalar_names=list(self.scalars), scalars=np.array(columns).transpose(2, 0, 1))
        self._report_dropped(stars, dropped)
        splits = split_stars(texts_of(stars, "object_id"))
        fitted, tested = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test")
        check_labels(stars.select(fitted), names)
        low, high = bare.config.rung_intervals[rung]
        say(f"{self.model}: predicts {', '.join(states.inputs)}, and {high - low} intervals for each spectrum")
        folds = make_folds(texts_of(stars, "object_id"), FOLDS, self.seed)
        choices = self._choose(base, tokenizer, rung, states, stars, fitted, folds)
        self._save(base, tokenizer)
        self._ranges(str(base.name_or_path), stars, names)
        few = not len(tested)
        if few:
            parts = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in np.unique(folds)]
            tested = fitted
        else:
            parts = [(fitted, tested)]
        answers = self._answers(stars, states, choices, parts, tested, few)
        evaluation, verdicts = self._evaluate(answers, stars.select(tested), few)
        for line in verdicts:
            say(line)
        heads = {name: str(choice) for name, choice in choices.items()}
        sizes = {"train": len(fitted)} | ({} if few else {"test": len(tested)})
        counted_causes = dict(Counter(entry["cause"].split(":")[0] for entry in dropped))
        self._report(stars, splits, folds, choices, answers, tested)
        self._card(evaluation, verdicts, heads, sizes, counted_causes, stars)
        complete = {"heads": heads, "sizes": sizes, "dropped": counted_causes, "verdicts": verdicts}
        return complete, evaluation

    def _report_dropped(self, stars: Dataset, dropped: Sequence[Mapping[str, str]]) -> None:
        """Report dropped spectra and anything unusual; ValueError for too few stars."""
        report = self.out / "report"
        report.mkdir(exist_ok=True)
        texts = pa.schema([(name, pa.string()) for name in ("file", "object_id", "cause")])
        _write_table(report / "dropped.csv", pa.Table.from_pylist(list(dropped), texts))
        if dropped:
            causes = Counter(entry["cause"].split(":")[0] for entry in dropped)
            counted = "; ".join(f"{cause}: {number:,}" for cause, number in causes.items())
            self.say(f"dropped {len(dropped):,} spectra, see {report / 'dropped.csv'}: {counted}")
        if moving := len(stars) - sum(stars["rest_frame"]):
            self.say(f"spectra not shifted to rest, as their velocity is unknown (--radial-velocity): {moving:,}")
        for note in self.table.notes:
            self.say(note)
        if (n_stars := len(set(texts_of(stars, "object_id")))) < MIN_STARS:
            raise ValueError(f"stars: expected at least {MIN_STARS} with a spectrum and a label, got {n_stars}")

    def _choose(self, base, tokenizer, rung, states, stars, fitted, folds) -> dict[str, Choice]:
        """Choose heads for each label, and add them to the base."""
        choices = {}
        grids = tokenizer.pixel_wavelength or []
        found = fit_pixels(states.pixels[fitted][:MOST_STARS])
        pixels = base.add_pixels(sum(map(len, grids)), *found.directions.shape)
        pixels.load_state_dict(found.state_dict())
        tokenizer.pixel_wavelength = [*grids, states.wavelength]
        for name, unit in self.table.units.items():
            target, error = column_of(stars, name), np.nan_to_num(column_of(stars, f"{name}_err"))
            own = fitted[np.isfinite(target[fitted])]
            choice = choose_heads(base.config, rung, name, states[own], target[own], error[own], folds[own], found)
            entries = [part.settings for part in choice.fitted]
            center, scale = float(np.median(target[own])), float(robust_scatter(target[own]) or target[own].std())
            if name not in tokenizer.label_names:
                tokenizer.add_label(name)
                self.say(f"new to the checkpoint: {name}{f' [{unit}]' if unit else ''}")
            if tokenizer.requests is not None and name not in tokenizer.requests:
                tokenizer.requests = [*tokenizer.requests, name]
            for part, correction in zip(choice.fitted, base.add_corrections(entries, unit, center, scale), strict=True):
                part.fill(correction)
            tried = ", ".join(f"{head} {rmse:.4g}" for head, rmse in choice.tried.items())
            self.say(f"{name}: {choice} ({FOLDS}-fold RMSE with outliers winsorised: {tried})")
            if choice.note:
                self.say(f"{name}: scalars: {choice.note}")
            choices[name] = choice
        tokenizer.scalar_names = list(base.config.scalar_names) or None
        return choices

    def _save(self, base: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer) -> None:
        """Write the checkpoint into `out`; `config.json` last, as it marks a complete checkpoint."""
        saved = self.out / "work" / "checkpoint"
        save_checkpoint(base, tokenizer, saved)
        for file in sorted(saved.iterdir(), key=lambda path: path.name == "config.json"):
            with complete_file(self.out / file.name) as temporary:
                shutil.copyfile(file, temporary)
        shutil.rmtree(saved)

    def _ranges(self, where: str, stars: Dataset, names: Sequence[str]) -> None:
        """Write `training_range.json` of the base with the label ranges of the stars."""
        training_range = TrainingRange.load(where) or TrainingRange()
        limits = {name: (float(np.nanmin(stars[name][:])), float(np.nanmax(stars[name][:]))) for name in names}
        TrainingRange(
            {**training_range.labels, **limits}, training_range.wavelength, training_range.wavelength_step
        ).save(self.out)

    def _answers(
        self,
        stars: Dataset,
        states: States,
        choices: Mapping[str, Choice],
        parts: Sequence[Any],
        tested: Any,
        few: bool,
    ) -> dict[str, Answers]:
        """Values and errors of the test stars, by model."""
        names = list(self.table.units)
        n_pixels = max(len(stars[0]["wavelength"]), 1)
        some = np.arange(min(len(stars), max(MAX_PIXELS // n_pixels, MIN_STARS)))
        some = np.union1d(some, tested)
        place = np.full(len(stars), -1)
        place[some] = np.arange(len(some))
        sample = Sample(
            *pixels_of(stars.select(some).with_format("numpy")),
            states[some],
            *(np.stack([column_of(stars, f"{name}{end}")[some] for name in names], axis=1) for end in ("", "_err")),
        )
        inner = [(place[fitted][place[fitted] >= 0], place[rows]) for fitted, rows in parts]
        if few:
            own: Answers = ({}, {})
            for name, choice in choices.items():
                for column, found in zip(own, (choice.values, choice.errors), strict=True):
                    column[name] = np.full(len(stars), np.nan)
                    column[name][np.isfinite(column_of(stars, name))] = found
        else:
            model, tokenizer = load_checkpoint(self.out)
            rows = cast(Any, stars.select(tested).with_format("numpy"))
            batches = list(predict_batches(model, tokenizer, batches_of(rows, tokenizer), names))
            joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
            own = {name: joined[name] for name in names}, {name: joined[f"{name}_err"] for name in names}
        answers = {TUNED: own}
        before = [name for name in names if name in states.inputs]
        if before:
            at = [states.inputs.index(name) for name in before]
            columns = (states.values[tested][:, at].T, states.errors[tested][:, at].T)
            values, errors = (dict(zip(before, part, strict=True)) for part in columns)
            answers[f"{Path(self.model).name}, as it was"] = values, errors
        for rival, both in ask_rivals(sample, inner, self.seed, self.say).items():
            values, errors = (dict(zip(names, part[place[tested]].T, strict=True)) for part in both)
            answers[rival] = values, errors
        return answers

    def _evaluate(self, answers: Mapping[str, Answers], tested: Dataset, few: bool) -> tuple[dict[str, Any], list[str]]:
        """An evaluation in the format of `scripts/paper/evaluate.py`, and the verdicts."""
        truth = {name: column_of(tested, name) for name in self.table.values}
        errors = {name: truth[f"{name}_err"] for name in self.table.units}
        verdicts = []
        for name, unit in self.table.units.items():
            known = np.isfinite(truth[name])
            left = {row: (v[name] - truth[name])[known] for row, (v, _) in answers.items() if name in v}
            verdicts.append(verdict(name, unit, left.pop(TUNED), left, self.seed))
        content = "\n".join(texts_of(tested, "object_id")).encode() + b"".join(
            column.tobytes() for column in truth.values()
        )
        split = "cross-validation" if few else "test"
        models: dict[str, Any] = {row: {"name": row} for row in answers}
        models[TUNED] |= checksums(*load_checkpoint(self.out))
        versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch", "transformers")}
        evaluation = {
            "command": self.command,
            "data": self.out.resolve().name,
            "split": split,
            "split_rule": BY_FOLDS if few else BY_STAR,
            "stars": {"all stars": len(tested)},
            "data_sha256": {split: hashlib.sha256(content).hexdigest()},
            "versions": {"python": platform.python_version(), **versions},
            "models": models,
            "results": {
                "all stars": {
                    row: table_metrics(*labels_of_stars, truth, errors) for row, labels_of_stars in answers.items()
                }
            },
        }
        return evaluation, verdicts

    def _report(self, stars, splits, folds, choices, answers, tested) -> None:
        """Tables in `report`, and the picture."""
        report = self.out / "report"
        identifiers = {name: texts_of(stars, name) for name in ("object_id", "file")}
        _write_table(report / "splits.csv", pa.table({**identifiers, "split": splits, "fold": folds}))
        tried = [
            {"label": name, "head": head, "rmse": rmse, "weight": choice.weights.get(head, 0.0)}
            for name, choice in choices.items()
            for head, rmse in choice.tried.items()
        ]
        _write_table(report / "heads.csv", pa.Table.from_pylist(tried))
        part = stars.select(tested)
        labels_of_stars = {f"given_{name}": column_of(part, name).astype(np.float32) for name in self.table.values}
        unknown, tables = np.full(len(part), np.nan, np.float32), []
        for row, (values, errors) in answers.items():
            columns = {name: values.get(name, unknown) for name in self.table.units}
            columns |= {f"{name}_err": errors.get(name, unknown) for name in self.table.units}
            columns = {name: column.astype(np.float32) for name, column in columns.items()}
            about = {"model": [row] * len(part), "object_id": texts_of(part, "object_id")}
            tables.append(pa.table({**about, **columns, **labels_of_stars}))
        _write_table(report / "predictions.csv", pa.concat_tables(tables))
        values, errors = answers[TUNED]
        if self.draw is not None:
            self.draw(self.out / "predicted.png", values, errors, part, self.table.units)

    def _card(self, evaluation, verdicts, heads, sizes, causes, stars) -> None:
        n_stars = len(set(texts_of(stars, "object_id")))
        joined_by = (
            f"The figures are from {FOLDS}-fold cross-validation; the checkpoint is fitted to all stars."
            if "test" not in sizes
            else f"The figures are for {sizes['test']:,} held-out test spectra."
        )
        write_model_card(
            self.out,
            recipe={"data": None, "checkpoint": self.model, "labels": list(heads), "heads": heads, "seed": self.seed},
            evaluations=[evaluation],
            base_model=self.model,
            remarks=(
                f"{' '.join(f'{line}.' for line in verdicts)}\n\n"
                f"Fine-tuned from `{self.model}` by `spectrafm finetune`: "
                f"{sizes['train']:,} spectra; {n_stars:,} stars in all. {joined_by} "
                f"{'; '.join(f'{name}: {head}' for name, head in heads.items())}: chosen by cross-validation. All "
                f"other predictions are those of `{self.model}`. Dropped spectra: "
                f"{'; '.join(f'{cause}: {number:,}' for cause, number in causes.items()) or 'none'}. If `{self.model}` "
                "was itself trained on some of these stars, the errors here are too small for new stars. Errors of the "
                "other models are calibrated on the stars of this comparison."
            ),
        )


def _working_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Path:
    """The folder `out/work`, where a run with the same settings resumes."""
    work = out / "work"
    stored = work / "settings.json"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not stored.is_file()):
        raise ValueError(f"out: expected a new folder, or a fine-tuning to resume, got other files in {out}")
    before = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else None
    if before is not None and (differing := [name for name in settings if before.get(name) != settings[name]]):
        # An incomplete run is replaced.
        if not overwrite and "complete" in before:
            name = differing[0]
            raise ValueError(
                f"out: expected a fine-tuning with {name}={settings[name]!r} in {out}, got {before.get(name)!r}; "
                "overwrite starts again"
            )
        (out / "config.json").unlink(missing_ok=True)
        before = None
    work.mkdir(parents=True, exist_ok=True)
    if before is None:
        write_json(stored, settings)
    return work


def _write_table(path: Path, table: pa.Table) -> None:
    with complete_file(path) as temporary:
        arrow_csv.write_csv(table, temporary)


__all__ = ["MIN_STARS", "UNREADABLE", "Tuned", "finetune"]
