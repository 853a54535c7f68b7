#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Average the weights of checkpoints that were fine-tuned from the same one.

    python scripts/average_checkpoints.py OUTPUT CHECKPOINT WEIGHT [CHECKPOINT WEIGHT ...] [--data gaia-xp]

The tokenizer and the training range are those of the first. With --data, the factors of the errors of the labels are
set on the validation stars of that data set, as training does at its end.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from spectrafm_hf.checkpoints import load_checkpoint, save_checkpoint
from spectrafm_hf.prediction import TrainingRange
from spectrafm_hf.training import Recipe, calibrate_errors, load_stars


def average(names: list[str], weights: list[float]):
    """Model of the mean weights and the tokenizer of the first."""
    models = [load_checkpoint(name) for name in names]
    model, tokenizer = models[0]
    shares = np.array(weights) / sum(weights)
    states = [other.state_dict() for other, _ in models]
    for other in states[1:]:
        if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in states[0].items()}:
            raise ValueError("checkpoint: expected checkpoints of one architecture, got different ones")
    with torch.no_grad():
        mean = {key: sum(share * state[key] for share, state in zip(shares, states, strict=True)) for key in states[0]}
    model.load_state_dict(mean)
    model.config.label_error_factors = []
    return model.eval(), tokenizer


def calibrate(model, tokenizer, data: str) -> None:
    """Error factors from the validation stars of a data set."""
    labels = list(tokenizer.requests or tokenizer.label_names)
    _, stars = load_stars(Recipe(data=data, labels=labels), seed=0)
    columns = stars.with_format("numpy")[:]
    center, scale = (np.array(values) for values in (model.config.label_centers, model.config.label_scales))
    index = [model.config.label_names.index(name) for name in labels]
    means, variances = [], []
    with torch.inference_mode():
        for start in range(0, len(stars), 256):
            batch = {name: columns[name][start : start + 256] for name in ("wavelength", "flux", "flux_error", "mask")}
            output = model(**tokenizer(batch, requests=labels))
            means.append((output.values.numpy() - center[index]) / scale[index])
            variances.append(2 * np.log(output.errors.numpy() / scale[index]))
    truth = tuple(np.stack([columns[f"{name}{end}"] for name in labels], axis=1) for end in ("", "_err"))
    calibrate_errors(model.config, labels, np.concatenate(means), np.concatenate(variances), truth)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("parts", nargs="+", metavar="CHECKPOINT WEIGHT")
    parser.add_argument("--data", help="a data set folder or name")
    arguments = parser.parse_args(argv)
    try:
        if len(arguments.parts) % 2:
            raise ValueError(f"parts: expected a weight after each checkpoint, got {arguments.parts}")
        names, weights = arguments.parts[::2], [float(text) for text in arguments.parts[1::2]]
        model, tokenizer = average(names, weights)
        if arguments.data:
            calibrate(model, tokenizer, arguments.data)
        training_range = TrainingRange.load(str(model.name_or_path))
        save_checkpoint(model, tokenizer, arguments.output)
        if training_range is not None:
            training_range.save(arguments.output)
    except (OSError, ValueError) as error:
        print(f"average_checkpoints.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
