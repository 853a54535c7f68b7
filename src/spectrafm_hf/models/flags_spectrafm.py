# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Flags of predictions: a table of their meanings, and a function that sets them.

The command line, the pipeline (`flags=True`) and surveys share them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


#: Flags of a spectrum that was shifted to rest by its lines, because the frame or the medium is not stated.
VELOCITY_MEASURED, MEDIUM_MEASURED = "velocity_measured", "medium_measured"
#: Name of each flag -> what it means, and what to do.
FLAGS = {
    "unlike_training": (
        "No training star looks like this spectrum: it differs from the nearest one by more than its errors.",
        "Look at the spectrum. Is it a single star? Are continuum and resolution as stated?",
    ),
    "no_signal": (
        "The mean flux is below its noise: the predictions are those of an average star.",
        "Do not use the predictions.",
    ),
    "bad_pixels": (
        "More than 1 % of the pixels were left out, because no star has such a flux.",
        "Mask the pixels that the pipeline of the instrument flags. The pixels left out were not used.",
    ),
    "velocity": (
        "The lines are not at rest, although the wavelengths are stated to be: the predictions are wrong.",
        "Give the radial velocity, or shift the wavelengths to the rest frame.",
    ),
    "medium": (
        "The lines are at their wavelengths in air, although vacuum is stated: the predictions are wrong.",
        "State the medium: `--air`, or `wavelength_medium` of the tokenizer.",
    ),
    VELOCITY_MEASURED: (
        "Neither the frame nor a velocity is stated. The velocity was measured from the lines and corrected.",
        "Nothing, if the velocity is plausible for a star. Otherwise state the velocity.",
    ),
    MEDIUM_MEASURED: (
        "The medium is not stated. The lines are at their wavelengths in air, which were converted to vacuum.",
        "Nothing. `--air` or `--vacuum` states the medium.",
    ),
    "disagree": (
        "Parts of the spectrum lead to different labels, by more than their errors.",
        "Compare the predictions from each part. Common causes: a bad continuum, a second star, wrong errors.",
    ),
    "edge": (
        "A prediction is outside the training range, or within one sigma of its limit.",
        "Treat the prediction as a limit.",
    ),
    "scalar_unknown": (
        "A scalar that a label is predicted from is unknown, or far from those of the labelled stars: that label is "
        "predicted from the spectrum alone.",
        "State the scalar, if it is known.",
    ),
    "other_errors": (
        "The pixels scatter by much more than their errors, or differ from all stars. The errors were increased.",
        "Check the errors of the spectrum. For bright stars it is usual, because models of stars are not perfect.",
    ),
}
#: Outputs of the tokenizer for the flags, which the model does not use.
QUALITY = ("clipped", "shift", "signal", "outside")
LEAST_SIGNAL = 5.0  # sigma, of the mean flux
BAD_PIXELS = 0.01  # of the pixels
LARGEST_MISMATCH = 0.5  # of the lines
LARGEST_OUTSIDE = 0.25  # of the pixels of a spectrum of another instrument
LARGEST_MISFIT = 2.5  # chi^2 per degree of freedom
MOVED, MOVED_SIGMA = 1.5, 5.0  # km/s, and in units of the error
# Wavelengths in air are shorter by 83 km/s in the optical, by 82 in the H band.
AIR, AIR_TOLERANCE = -82.0, 8.0
DISAGREE = 4.0  # standard deviations of chi^2
#: Sigma between the predictions from two halves of the observed intervals, for a rung without a star model. Those of 88
#: validation stars of MILES differ by at most 1.9.
HALVES_DISAGREE = 3.5
LABELS_OF_HALVES = ("teff", "logg", "fe_h")
LEAST_RELIABLE = 0.02  # of an interval that counts as observed
LEAST_INTERVALS = 2  # of each half


def star_flags(
    model: Any, inputs: Mapping[str, Any], outputs: Any, quality: Mapping[str, Any], names: Sequence[str]
) -> list[list[str]]:
    """
    Flags of each star.

    Parameters
    ----------
    model : SpectraFMForPrediction
    inputs : mapping
        Outputs of the tokenizer, the inputs of the model.
    outputs : SpectraFMPredictionOutput
    quality : mapping of str to array of shape (stars,)
        `clipped`, `shift`, `signal` and `outside` of the tokenizer (`return_quality=True`).
    names : sequence of str
        Names of the requests.

    Returns
    -------
    list of list of str
        In the order of `FLAGS`.
    """
    n_stars = len(outputs.predictions)
    found: list[set[str]] = [set() for _ in range(n_stars)]

    def add(flag: str, where: torch.Tensor) -> None:
        for star in torch.nonzero(where)[:, 0].tolist():
            found[star].add(flag)

    clipped, shift, signal, outside = (torch.as_tensor(quality[name]).cpu() for name in QUALITY)
    add("no_signal", signal < LEAST_SIGNAL)
    add("bad_pixels", clipped > BAD_PIXELS)
    air = (shift - AIR).abs() <= AIR_TOLERANCE
    add("medium", (shift != 0) & air)
    add("velocity", (shift != 0) & ~air)
    refined, config, misfit = outputs.refined, model.config, inputs["misfit"].float()
    by_stars = torch.zeros(n_stars, dtype=torch.bool)
    if refined is not None:
        own = _has_star_intervals(model, inputs)
        by_stars = refined.converged.cpu()
        add("unlike_training", own & (~by_stars | (refined.mismatch.cpu() > LARGEST_MISMATCH)))
        velocity, error = refined.velocity.cpu(), refined.velocity_error.cpu()
        add("velocity", by_stars & (velocity.abs() > MOVED) & (velocity.abs() > MOVED_SIGMA * error))
        add("disagree", by_stars & (refined.disagreement.cpu() > DISAGREE))
        add("other_errors", own & (misfit.nanmedian(dim=1).values.cpu() > LARGEST_MISFIT))
    for number, (limit, misfit_limit) in enumerate(config.evidence_limits):
        first, last = config.rung_intervals[number]
        own = (inputs["interval_ids"] >= first) & (inputs["interval_ids"] < last)
        chi2 = torch.where(own, misfit, torch.nan).nanmedian(dim=1).values.cpu()
        here = ~by_stars & outputs.rung_seen[:, number].cpu()
        add("unlike_training", here & ((outputs.cost[:, number].cpu() > limit) | (chi2 > misfit_limit)))
        calibrated = any(config.rung_error_curves) and config.rung_error_curves[number]
        if calibrated and not _by_pixels(config, number) and here.any():
            add("disagree", here & _halves_disagree(model, inputs, own))
        if _by_pixels(config, number):
            # A rung for one instrument alone (Gaia XP); a prism that sees to 2.5 micron is another one.
            add("unlike_training", here & (outside > LARGEST_OUTSIDE))
    values, errors = outputs.predictions.float().cpu(), outputs.prediction_errors.float().cpu()
    star_model = model.refinement.star_model if config.star_labels else None

    def at_edge(i: int, low: float | torch.Tensor, high: float | torch.Tensor) -> torch.Tensor:
        return (values[:, i] < low + errors[:, i]) | (values[:, i] > high - errors[:, i])

    for i, name in enumerate(names):
        edge = at_edge(i, *_range_of_rungs(config, name, outputs.rung_seen.cpu()))
        if star_model is not None and name in config.star_labels:
            row = list(config.star_labels).index(name)
            edge = torch.where(by_stars, at_edge(i, float(star_model.low[row]), float(star_model.high[row])), edge)
        for settings, correction in zip(config.corrections, model.corrections, strict=True):
            if settings["label"] == name:
                own = outputs.rung_seen[:, settings["rung"]].cpu()
                edge = torch.where(own, at_edge(i, *settings["range"]), edge)
                if correction.scalars:
                    add("scalar_unknown", own & model.blind(correction, inputs["scalars"]).cpu())
        add("edge", edge & values[:, i].isfinite())
    return [[flag for flag in FLAGS if flag in flags] for flags in found]


def _by_pixels(config: Any, rung: int) -> bool:
    """Whether the network of a rung sees a completed spectrum rather than amplitudes."""
    return bool(config.rung_pixels and config.rung_pixels[rung])


@torch.no_grad()
def _halves_disagree(model: Any, inputs: Mapping[str, Any], own: torch.Tensor) -> torch.Tensor:
    """(stars,): whether the two halves of the seen intervals of a rung, `own` (stars, intervals), lead to two stars."""
    names = [name for name in LABELS_OF_HALVES if name in model.config.network_labels]
    ids = torch.tensor(model.config.label_ids(names), device=own.device).expand(len(own), -1)
    seen = own & inputs["attention_mask"].bool() & (inputs["reliability"] > LEAST_RELIABLE).any(dim=-1)
    number = seen.sum(dim=1, keepdim=True)
    is_red = 2 * seen.cumsum(dim=1) > number
    answers = []
    for half in (seen & ~is_red, seen & is_red):
        (columns,) = torch.nonzero(half.any(dim=0), as_tuple=True)
        evidence = {name: inputs[name][:, columns] for name in ("coefficients", "reliability", "interval_ids")}
        outputs = model.model(**evidence, attention_mask=half[:, columns])
        answers.append([each.float().cpu() for each in model.uncorrected(outputs, None, ids)])
    (blue, blue_error), (red, red_error) = answers
    far = (blue - red).abs() > HALVES_DISAGREE * torch.hypot(blue_error, red_error)
    return far.any(dim=1) & (number[:, 0].cpu() >= 2 * LEAST_INTERVALS)


def _range_of_rungs(config: Any, name: str, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of a label in the training of the rungs that each star was seen in, (stars,) each."""
    pairs = [ranges.get(name, (-torch.inf, torch.inf)) for ranges in config.label_ranges]
    pairs = pairs or [(-torch.inf, torch.inf)] * seen.shape[1]
    low, high = torch.tensor(pairs, dtype=torch.float32).T
    return (
        torch.where(seen, low, torch.inf).amin(dim=1),
        torch.where(seen, high, -torch.inf).amax(dim=1),
    )


def _has_star_intervals(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    first, last = model.config.star_intervals
    ids = inputs["interval_ids"]
    return ((ids >= first) & (ids < last) & inputs["attention_mask"].bool()).any(dim=1).cpu()


__all__ = ["FLAGS", "MEDIUM_MEASURED", "QUALITY", "VELOCITY_MEASURED", "star_flags"]
