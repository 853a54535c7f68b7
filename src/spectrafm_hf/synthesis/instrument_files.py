# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Instruments as YAML files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..models.gate_spectrafm import air_to_vacuum
from .line_spread import (
    FWHM,
    Distribution,
    LineSpread,
    Noise,
)


Array = NDArray[Any]


FIELDS = {
    "name",
    "description",
    "emulator",
    "wavelength",
    "line_spread",
    "noise",
    "masks",
    "extinction",
    "tilt",
    "normalisation",
}


NORMALISATIONS = ("none", "median", "continuum")


class InstrumentReader:
    """Checks and turns the settings of a file into an instrument; an error names file, field, expectation and value."""

    def __init__(self, source: str):
        self.source = source

    def fail(self, where: str, expected: str, value: Any) -> NoReturn:
        raise ValueError(f"{self.source}: {where}: expected {expected}, got {repr(value)[:200]}")

    def mapping(self, where: str, value: Any, allowed: Iterable[str], required: Iterable[str] = ()) -> dict[str, Any]:
        allowed = sorted(allowed)
        if not isinstance(value, Mapping):
            self.fail(where, f"fields out of {allowed}", value)
        for name in value:
            if name not in allowed:
                self.fail(where, f"fields out of {allowed}", name)
        for name in required:
            if name not in value:
                self.fail(where, f"a field {name!r}", sorted(value))
        return dict(value)

    def number(self, where: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`; YAML takes 6e-6, without a point, for a text."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and low <= number <= high):
            limits = "" if math.isinf(low) and math.isinf(high) else f" from {low:g} to {high:g}"
            self.fail(where, f"a number{limits}", value)
        return number

    def integer(self, where: str, value: Any, low: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fail(where, f"a whole number of at least {low}", value)
        return value

    def numbers(
        self, where: str, value: Any, low: float = -math.inf, increasing: bool = False, size: int = 0
    ) -> list[float]:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value or (size and len(value) != size):
            self.fail(where, f"a list of {size or 'some'} numbers", value)
        result = [self.number(f"{where}[{i}]", item, low) for i, item in enumerate(value)]
        if increasing and any(a >= b for a, b in itertools.pairwise(result)):
            self.fail(where, "increasing numbers", value)
        return result

    def fields(self, settings: Any) -> dict[str, Any]:
        """The fields of [`Instrument`]."""
        settings = self.mapping("file", settings, FIELDS, ("name", "wavelength", "line_spread", "noise"))
        for name in ("name", "description", "emulator"):
            if not isinstance(settings.get(name, ""), str):
                self.fail(name, "a text", settings[name])
        if (normalisation := settings.get("normalisation", "none")) not in NORMALISATIONS:
            self.fail("normalisation", f"one of {NORMALISATIONS}", normalisation)
        return dict(
            name=settings["name"],
            description=" ".join(settings.get("description", "").split()),
            emulator=settings.get("emulator", ""),
            detectors=self.detectors(settings["wavelength"]),
            line_spread=self.line_spread(settings["line_spread"]),
            noise=self.noise(settings["noise"]),
            masks=self.masks(settings.get("masks") or []),
            extinction=self.distribution("extinction", settings["extinction"]) if settings.get("extinction") else None,
            tilt=self.tilt(settings["tilt"]) if settings.get("tilt") else None,
            normalisation=normalisation,
            settings=settings,
        )

    def detectors(self, value: Any) -> tuple[Array, ...]:
        value = self.mapping("wavelength", value, ("medium", "detectors"), ("detectors",))
        if (medium := value.get("medium", "vacuum")) not in ("vacuum", "air"):
            self.fail("wavelength.medium", "'vacuum' or 'air'", medium)
        if not isinstance(value["detectors"], list) or not value["detectors"]:
            self.fail("wavelength.detectors", "a list", value["detectors"])
        grids = [self.grid(f"wavelength.detectors[{i}]", item) for i, item in enumerate(value["detectors"])]
        for i, (one, following) in enumerate(itertools.pairwise(grids)):
            if following[0] <= one[-1]:
                self.fail(f"wavelength.detectors[{i + 1}]", f"a start above {one[-1]:.3f}", float(following[0]))
        return tuple(air_to_vacuum(grid) if medium == "air" else grid for grid in grids)

    def grid(self, where: str, value: Any) -> Array:
        """Linear: `start`, `step`; logarithmic: `log10_start`, `log10_step`; both with pixels `first` to `last`."""
        if isinstance(value, Mapping) and "values" in value:
            value = self.mapping(where, value, ("values",))
            grid = np.array(self.numbers(f"{where}.values", value["values"], increasing=True))
        else:
            prefix = "log10_" if isinstance(value, Mapping) and "log10_start" in value else ""
            start, step = f"{prefix}start", f"{prefix}step"
            value = self.mapping(where, value, (start, step, "first", "last"), (start, step, "last"))
            first = self.integer(f"{where}.first", value.get("first", 0), 0)
            last = self.integer(f"{where}.last", value["last"], first + 1)
            numbers = self.number(f"{where}.{start}", value[start]) + self.number(
                f"{where}.{step}", value[step], 0
            ) * np.arange(first, last + 1)
            grid = 10**numbers if prefix else numbers
        if len(grid) < 4 or not (grid[0] >= 912 and grid[-1] <= 320_000 and np.all(np.diff(grid) > 0)):
            self.fail(
                where,
                "at least 4 increasing wavelengths from 912 to 320,000 Angstrom",
                [float(grid[0]), "...", float(grid[-1])],
            )
        return grid

    def line_spread(self, value: Any) -> tuple[LineSpread, ...]:
        if not isinstance(value, list):
            return (self.spread("line_spread", value),)
        parts = [self.spread(f"line_spread[{i}]", item) for i, item in enumerate(value)]
        for i, (one, following) in enumerate(itertools.pairwise(parts)):
            if not (one.start < following.start and one.stop < following.stop):
                self.fail(
                    f"line_spread[{i + 1}].range", "ranges in increasing order", [following.start, following.stop]
                )
        return tuple(parts)

    def spread(self, where: str, value: Any) -> LineSpread:
        """`resolving_power`, or `fwhm` or `sigma`: a number, a number `at` a wavelength to a `power`, or a table."""
        value = self.mapping(where, value, ("resolving_power", "fwhm", "sigma", "at", "power", "wavelength", "range"))
        kinds = [name for name in ("resolving_power", "fwhm", "sigma") if name in value]
        if len(kinds) != 1:
            self.fail(where, "one of resolving_power, fwhm, sigma", kinds)
        (kind,) = kinds
        limits = self.numbers(f"{where}.range", value["range"], 0, True, 2) if "range" in value else [0.0, math.inf]
        if "wavelength" in value:
            nodes = self.numbers(f"{where}.wavelength", value["wavelength"], 1, True)
            widths = self.numbers(f"{where}.{kind}", value[kind], 1e-9, size=len(nodes))
            if kind == "resolving_power":
                widths = [node / power for node, power in zip(nodes, widths, strict=True)]
            power = None
        else:
            widths = [self.number(f"{where}.{kind}", value[kind], 1e-9)]
            nodes = [self.number(f"{where}.at", value.get("at", 5000.0), 1)]
            power = self.number(f"{where}.power", value.get("power", 0.0))
            if kind == "resolving_power":
                widths, power = [nodes[0] / widths[0]], 1.0
        factor = FWHM if kind == "sigma" else 1.0
        return LineSpread(tuple(nodes), tuple(factor * width for width in widths), power, *limits)

    def noise(self, value: Any) -> Noise:
        value = self.mapping("noise", value, ("snr", "error_shape", "flux_power", "correlation"), ("snr",))
        snr = self.distribution("noise.snr", value["snr"], 1e-3)
        power = self.number("noise.flux_power", value.get("flux_power", 0.5), 0, 1)
        correlation = self.number("noise.correlation", value.get("correlation", 0.0), 0, 1000)
        if "error_shape" not in value:
            return Noise(snr, flux_power=power, correlation=correlation)
        where = "noise.error_shape"
        shape = self.mapping(where, value["error_shape"], ("wavelength", "snr", "values"), ("wavelength", "values"))
        nodes = self.numbers(f"{where}.wavelength", shape["wavelength"], 1, True)
        snrs = self.numbers(f"{where}.snr", shape.get("snr", [1.0]), 1e-3, True)
        rows = shape["values"]
        if not isinstance(rows, list) or len(rows) != len(snrs):
            self.fail(f"{where}.values", f"a list for each of the {len(snrs)} values of snr", rows)
        table = [self.numbers(f"{where}.values[{i}]", row, 1e-9, size=len(nodes)) for i, row in enumerate(rows)]
        return Noise(snr, tuple(nodes), tuple(snrs), tuple(map(tuple, table)), power, correlation)

    def distribution(self, where: str, value: Any, low: float = 0.0) -> Distribution:
        """A number, `{uniform: [a, b]}`, `{log_uniform: [a, b]}` or `{quantiles: {probability: value}}`."""
        if not isinstance(value, Mapping):
            return Distribution((0.0,), (self.number(where, value, low),))
        value = self.mapping(where, value, ("uniform", "log_uniform", "quantiles"))
        if len(value) != 1:
            self.fail(where, "one of uniform, log_uniform, quantiles", sorted(value))
        ((kind, content),) = value.items()
        if kind != "quantiles":
            lowest = max(low, 1e-9) if kind == "log_uniform" else low
            limits = self.numbers(f"{where}.{kind}", content, lowest, True, 2)
            return Distribution((0.0, 1.0), tuple(limits), kind == "log_uniform")
        if not isinstance(content, Mapping):
            self.fail(f"{where}.quantiles", "probability: value", content)
        nodes = self.numbers(f"{where}.quantiles", list(content), 0, True)
        if nodes[0] != 0 or nodes[-1] != 1:
            self.fail(f"{where}.quantiles", "probabilities from 0 to 1", nodes)
        values = self.numbers(f"{where}.quantiles", list(content.values()), low)
        if sorted(values) != values:
            self.fail(f"{where}.quantiles", "values that do not decrease", values)
        return Distribution(tuple(nodes), tuple(values))

    def masks(self, value: Any) -> tuple[tuple[float, float], ...]:
        if not isinstance(value, list):
            self.fail("masks", "a list of [low, high] in Angstrom", value)
        ranges = [self.numbers(f"masks[{i}]", item, 0, True, 2) for i, item in enumerate(value)]
        return tuple((low, high) for low, high in ranges)

    def tilt(self, value: Any) -> tuple[float, int]:
        value = self.mapping("tilt", value, ("amplitude", "degree"), ("amplitude", "degree"))
        return self.number("tilt.amplitude", value["amplitude"], 0, 1), self.integer("tilt.degree", value["degree"], 1)
