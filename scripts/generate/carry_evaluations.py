# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Update the checksums in evaluations of an unchanged rung to those of a new checkpoint.

    python scripts/generate/carry_evaluations.py OLD NEW --rung 0 EVALUATION.json [EVALUATION.json ...]

A training of one rung (`scripts/pretrain_survey.py`) does not change predictions of the others, but changes the
checksum of the weights. OLD and NEW are folders of checkpoints; `--rung` is the rung of the evaluated spectra: 0 for
Gaia XP, 1 for the H band. All weights, settings and directions that affect its predictions have to be identical;
otherwise nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectrafm_hf import load_checkpoint
from spectrafm_hf.files import complete_file
from spectrafm_hf.hub.cards import checksums


#: Settings that have an entry for each rung, and those that only count the rungs.
OF_RUNGS = (
    *("rung_intervals", "rung_components", "rung_pixels", "rung_features", "rung_error_factors", "rung_error_floors"),
    *("label_ranges", "evidence_limits", "rung_error_knots", "rung_error_curves"),
)
COUNTS = ("num_intervals", "transformers_version", "_name_or_path")


def differences(old: tuple[Any, Any], new: tuple[Any, Any], rung: int) -> list[str]:
    """Names of different weights, settings and directions that affect the predictions of a rung."""
    found = []
    weights = [model.state_dict() for model, _ in (old, new)]
    for name in sorted(set(weights[0]) | set(weights[1])):
        parts = [part for part in ("model.rungs", "means", "log_variances") if name.startswith(f"{part}.")]
        if any(not name.startswith(f"{part}.{rung}.") for part in parts):
            continue
        values = [part.get(name) for part in weights]
        if any(value is None for value in values) or not torch.equal(*values):
            found.append(name)
    settings = [model.config.to_dict() for model, _ in (old, new)]
    for own, (model, _) in zip(settings, (old, new), strict=True):
        own["rung_ffn_dim"] = model.config.ffn_dim_of(rung)
    for name in sorted(set(settings[0]) | set(settings[1])):
        own = [part.get(name) for part in settings]
        if name in OF_RUNGS:
            own = [value[rung] if value else None for value in own]
        if name not in COUNTS and own[0] != own[1]:
            found.append(name)
    directions = [tokenizer.basis.rungs[rung] for _, tokenizer in (old, new)]
    for field in fields(directions[0]):
        if field.name.startswith("kind_"):  # for whole spectra, not for labels
            continue
        if not np.array_equal(*(getattr(part, field.name) for part in directions)):
            found.append(f"basis.{rung}.{field.name}")
    return found


def carry(path: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Replace the old checksums, which have to be there, by the new ones."""
    text = path.read_text(encoding="utf-8")
    for name, value in old.items():
        if value not in text:
            raise ValueError(f"{path}: expected an evaluation with the {name} {value[:12]}..., got another one")
        text = text.replace(value, new[name])
    with complete_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="carry_evaluations.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--rung", type=int, required=True)
    arguments = parser.parse_args(argv)
    old, new = load_checkpoint(arguments.old), load_checkpoint(arguments.new)
    if found := differences(old, new, arguments.rung):
        print(f"rung {arguments.rung}: expected the same weights and settings, got others in {', '.join(found[:5])}")
        return 2
    for path in arguments.evaluations:
        carry(path, checksums(*old), checksums(*new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
