# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The card of a checkpoint: written from its weights, its recipe and its evaluations, so that no figure is typed.

Beside the weights it leaves all that the card is made of: ``README.md`` (the card), ``.eval_results/*.yaml`` (the
figures as the hub reads them), ``recipe.yaml`` and ``evaluation.json``. The text is
``resources/model_card.md``; what a person adds to a card stands between marks (see [`free_text`]) and is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from transformers.utils import cached_file

from ..checkpoints import load_checkpoint
from ..files import RESOURCES, complete_file
from ..free_text import free_texts, keep_free_texts
from ..inference.training_range import RANGE_FILE, TrainingRange
from ..models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from .card_sections import (
    FIGURES,
    TITLES,
    Group,
    _calibration,
    _data,
    _failures,
    _label_range,
    _main_figures,
    _tables,
    _wavelength_ranges,
)


logger = logging.getLogger(__name__)

TEMPLATE = RESOURCES / "model_card.md"


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer) -> dict[str, str]:
    """
    What decides the answers of a checkpoint, by the names that an evaluation has for it, in hexadecimal digits.

    Parameters
    ----------
    model, tokenizer
        As `load_checkpoint` gives them, unchanged.

    Returns
    -------
    dict of str to str
        `model_sha256` of the file of the weights; `settings_sha256` of the basis, the settings of model and tokenizer,
        and the training range, which decides the flags. Settings at their defaults do not count: there are more of them
        in another version of this package or of transformers.
    """
    where = str(model.name_or_path)
    ranges = TrainingRange.load(where)
    settings: dict[str, Any] = {
        "model": _beyond(model.config.to_dict(), SpectraFMConfig().to_dict()),
        "tokenizer": _beyond(tokenizer.to_dict(), SpectraFMTokenizer().to_dict()),
        "training_range": ranges and asdict(ranges),
    }
    if tokenizer.basis is not None:
        settings["basis"] = sha256(cached_file(where, "basis.safetensors") or "")
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return {
        "model_sha256": sha256(cached_file(where, "model.safetensors") or ""),
        "settings_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
    }


def name_checksums(sums: Mapping[str, Any]) -> str:
    """The beginnings of `checksums`, for a message."""
    weights, settings = (str(sums.get(name) or "none")[:16] for name in ("model_sha256", "settings_sha256"))
    return f"weights {weights} with settings {settings}"


def write_model_card(
    checkpoint: Path,
    *,
    recipe: Path | Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    base_model: str | None = None,
    remarks: str = "",
    license: str | None = None,
) -> Path:
    """
    Write the card of a checkpoint, with its recipe and evaluations.

    Parameters
    ----------
    checkpoint : path
        Folder of a whole checkpoint with its `training_range.json`. Its name is the title of the card.
    recipe : path or mapping
        Settings of the training: a YAML file or its content. `data` of None: unknown data.
    evaluations : sequence of mapping
        What `scripts/paper/evaluate.py --output` writes, the most important first. At least one must be of these
        weights with these settings; one of other models alone adds their rows, and must be on the same stars as one
        that is.
    base_model : str, optional
        What it was trained on from. Default: the `checkpoint` of the recipe.
    remarks : str
        Markdown below the figures, with remarks on them. By default what an earlier card of these
        weights has there.
    license : str, optional
        Of the weights, by its name on the hub. Default: what an earlier card states; without one, none is.

    Returns
    -------
    pathlib.Path
        The card, `checkpoint/README.md`.

    Raises
    ------
    ValueError
        If the checkpoint is not whole or has no training range; if no evaluation is of it (`checksums`), or one is of
        others and other stars; if there is a README.md that is no card with marks for free text, which would be lost.
    """
    checkpoint = Path(checkpoint)
    old = _read_card(checkpoint)
    model, tokenizer = load_checkpoint(checkpoint)
    ranges = TrainingRange.load(checkpoint)
    if ranges is None or not ranges.labels:
        raise ValueError(f"checkpoint: expected {RANGE_FILE} with the range of each label in {checkpoint}, got none")
    weights = checkpoint / "model.safetensors"
    sums = checksums(model, tokenizer)
    plain = [_plain(evaluation) for evaluation in evaluations]
    name = checkpoint.resolve().name
    groups = group_evaluations(plain, sums, name)
    # Older cards have fewer checksums.
    same = old is not None and bool(described := checksums_of_card(old)) and described.items() <= sums.items()
    recipe_text = (
        recipe.read_text(encoding="utf-8")
        if isinstance(recipe, Path)
        else yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=120)
    )
    settings = yaml.safe_load(recipe_text)
    if not isinstance(settings, dict):
        raise ValueError(f"recipe: expected settings by name, got {type(settings).__name__}")
    base = base_model or settings.get("checkpoint")
    base = Path(base).name if base and Path(base).is_dir() else base
    data = list(settings.get("sources") or filter(None, [settings.get("data", "gaia-xp")]))
    labels = list(tokenizer.requests or model.config.label_names)
    units = dict(zip(model.config.label_names, model.config.label_units, strict=True))
    factors = dict(zip(model.config.label_names, model.config.label_error_factors or [1.0] * len(units), strict=True))
    card = ModelCard.from_template(
        ModelCardData(
            license=license or (ModelCard(old).data.get("license") if old is not None else None),
            library_name="transformers",
            pipeline_tag="other",
            tags=["astronomy", "spectroscopy", "stellar-labels", "spectrafm"],
            base_model=base,
            datasets=[Path(dataset).name if Path(dataset).is_dir() else dataset for dataset in data] or None,
            model_name=name,
            eval_results=list(_index(groups, name)),
        ),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        parameters=f"{model.num_parameters():,}",
        size=f"{weights.stat().st_size / 1e6:.1f}",
        labels=", ".join(labels),
        usage=usage(name),
        label_ranges="\n".join(_label_range(label, units[label], ranges) for label in labels),
        wavelength_ranges="\n".join(_wavelength_ranges(ranges)),
        evaluations="\n\n".join(_tables(group, name, units) for group in groups),
        remarks=remarks.strip() or (_remarks(old) if old is not None and same else ""),
        calibration=_calibration(groups, name, factors),
        failures="\n".join(_failures(groups, name, units)),
        recipe=recipe_text.strip(),
        data=_data(data),
        **sums,
    )
    # Jinja leaves empty lines where a condition stood.
    text = re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"
    if old is not None:
        if not same and any(free_texts(old).values()):
            logger.warning(
                "%s: the free text was written for other weights or settings: read it again", checkpoint / "README.md"
            )
        text = keep_free_texts(text, old)
    _write(checkpoint / "recipe.yaml", recipe_text)
    _write(checkpoint / "evaluation.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
    shutil.rmtree(checkpoint / ".eval_results", ignore_errors=True)
    (checkpoint / ".eval_results").mkdir()
    for file, content in eval_results(groups, name, units).items():
        _write(checkpoint / ".eval_results" / file, content)
    _write(checkpoint / "README.md", text)
    return checkpoint / "README.md"


def usage(name: str) -> str:
    """How to load the checkpoint of that name: the same text for a bundled one, a folder and one on the hub."""
    return f"""```python
from spectrafm_hf import load_checkpoint

model, tokenizer = load_checkpoint("{name}")
outputs = model(**tokenizer(wavelength, flux, flux_error=flux_error))
outputs.predictions, outputs.prediction_errors  # (stars, labels)
```

From the command line: `spectrafm predict FILES --model {name}`. Where the package is not installed, a folder or a
name on the hub loads with the code that it carries:

```python
from transformers import pipeline

predict = pipeline("stellar-labels", model="{name}", trust_remote_code=True)
predict({{"wavelength": wavelength, "flux": flux, "flux_error": flux_error}})
```"""


def with_owner(card: str, owner: str) -> str:
    """
    A card whose base model and data sets are `owner/name`, as the hub links them: those without an owner get this one,
    whose they are if they are pushed as well.
    """
    found = ModelCard(card)
    about: Any = found.data

    def full(name: str) -> str:
        return name if "/" in name else f"{owner}/{name}"

    if isinstance(about.base_model, str):
        about.base_model = full(about.base_model)
    if about.datasets:
        about.datasets = list(map(full, about.datasets))
    return str(found)


def group_evaluations(evaluations: Sequence[Mapping[str, Any]], sums: Mapping[str, str], name: str) -> list[Group]:
    """
    Results of the same stars in one table, in which the rows of the one with these `checksums` are called `name`.

    Raises
    ------
    ValueError
        If an evaluation is not what `scripts/paper/evaluate.py` writes, or a table has no row of this checkpoint.
    """
    groups: dict[tuple[str, str, str], Group] = {}
    for evaluation in evaluations:
        try:
            data, split = evaluation["data"], evaluation["split"]
            key = (data, split, evaluation["data_sha256"][split])
            own = {row for row, about in evaluation["models"].items() if sums.items() <= about.items()}
            others = {row: Path(row).name for row in evaluation["models"] if row not in own}
            rows = dict.fromkeys(own, name)
            rows |= {row: f"{other}, other weights" if other == name else other for row, other in others.items()}
            group = groups.setdefault(key, Group(data, split, evaluation["split_rule"], evaluation["stars"], {}, []))
            group.sources.append(evaluation)
            for title, results in evaluation["results"].items():
                group.results.setdefault(title, {}).update({rows[row]: table for row, table in results.items()})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"evaluation: expected the output of scripts/paper/evaluate.py, which lacks {error}"
            ) from error
    if not groups:
        raise ValueError(f"evaluation: expected one of {name_checksums(sums)}, got none")
    for group in groups.values():
        found = [about for one in group.sources for about in one["models"].values()]
        if not any(sums.items() <= about.items() for about in found):
            what = ", ".join(name_checksums(about) for about in found if "model_sha256" in about) or "none"
            raise ValueError(f"evaluation: expected one of {name_checksums(sums)}, got {what}")
    return list(groups.values())


def eval_results(groups: Sequence[Group], name: str, units: Mapping[str, str]) -> dict[str, str]:
    """
    The figures of the main tables for `.eval_results`: YAML by name of file, one for each data set.

    The hub documents `dataset.id` as that of a data set there which is registered as a benchmark, and `task_id` as one
    of its tasks. Ours are none: the id is `data` of the evaluation, OWNER/NAME for a data set that is on the hub, and
    otherwise a name that is valid in form alone, with which no leaderboard has the figures.
    """
    files: dict[str, list[EvalResultEntry]] = {}
    for group in groups:
        entries = files.setdefault(f"{re.sub(r'[^A-Za-z0-9.-]+', '-', group.data)}.yaml", [])
        for label, figure, value in _main_figures(group, name):
            unit = "" if figure == "robust_z" or not units[label] else f" [{units[label]}]"
            about = f"{FIGURES[figure]} of {label}{unit}; {group.stars[group.main]} {group.split} stars, {group.main}"
            entries.append(EvalResultEntry(_dataset_id(group.data), f"{label}_{figure}", value, notes=about))
    return {
        file: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, width=120)
        for file, entries in files.items()
    }


def checksums_of_card(card: str) -> dict[str, str]:
    """The `checksums` stated in a card."""
    places = {"model_sha256": r"Weights: `model\.safetensors`, SHA-256", "settings_sha256": "training range, SHA-256"}
    found = {name: re.search(rf"{place}\s+`([0-9a-f]{{64}})`", card) for name, place in places.items()}
    return {name: match[1] for name, match in found.items() if match}


def read_evaluations(checkpoint: Path) -> list[dict[str, Any]]:
    """What stands in `evaluation.json` of a checkpoint: one evaluation, or a list."""
    try:
        content = json.loads((checkpoint / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluation: expected evaluation.json in {checkpoint}, got {error}") from error
    return content if isinstance(content, list) else [content]


# --------------------------------------------------------------------------------------------------------------- parts


def _read_card(checkpoint: Path) -> str | None:
    """The card of an earlier run; None if there is none."""
    path = checkpoint / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        marked = free_texts(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not marked:
        raise ValueError(
            f"{path}: expected a card with marks for free text, got another text; move it away and run again"
        )
    return text


def _remarks(card: str) -> str:
    found = re.search(r"^<!-- remarks -->\n(.*?)^<!-- end of remarks -->$", card, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def _beyond(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not at their defaults, as JSON has them, without who wrote them and for which class."""
    settings, defaults = (json.loads(json.dumps(inputs)) for inputs in (settings, defaults))
    ours = settings.keys() - {"transformers_version", "architectures", "_name_or_path"}
    return {name: settings[name] for name in ours if name not in defaults or settings[name] != defaults[name]}


def _plain(value: Any) -> Any:
    """JSON and YAML know no tuples, and JSON no NaN (the figures of a table without stars): it becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _dataset_id(data: str) -> str:
    """A name that the hub takes for that of a data set: others make the whole file or card invalid there."""
    return re.sub(r"[^A-Za-z0-9_./]+|\.{2,}", "-", data).strip("-./")[:96] or "unnamed"


def _index(groups: Sequence[Group], name: str) -> Iterator[EvalResult]:
    """The same figures as `.eval_results` in the older form, for the metadata of the card."""
    for group in groups:
        for label, figure, value in _main_figures(group, name):
            yield EvalResult(
                task_type="tabular-regression",
                task_name="stellar labels",
                dataset_type=_dataset_id(group.data),
                dataset_name=TITLES.get(group.data, group.data),
                dataset_split=group.split,
                metric_type=figure,
                metric_name=f"{FIGURES[figure]} of {label}, {group.main}",
                metric_value=value,
            )
