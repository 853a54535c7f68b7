# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of an emulator of synthetic stellar spectra."""

from itertools import pairwise

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


AUTO_MAP = {
    "AutoConfig": "configuration_emulator.SpectrumEmulatorConfig",
    "AutoModel": "modeling_emulator.SpectrumEmulator",
}


@strict
class SpectrumEmulatorConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SpectrumEmulator`].

    Parameters
    ----------
    label_names, label_units : list[str]
        Stellar labels, `teff`, `logg` and `fe_h` first.
    label_minimum, label_maximum : list[float]
        Their range in the grid; the emulator refuses values outside it.
    num_stars : int
        Synthetic stars of its grid.
    num_pixels : int
        Pixels of a spectrum.
    component_groups : list[int]
        Numbers of principal components that share a covariance function.
    fluxed : bool
        Whether it also predicts the continuum, in `flux_unit`.
    flux_unit : str
        Unit of the continuum, as astropy writes it.
    resolving_power : float
        Of the Gaussian line spread function in the spectra; 0: none, each pixel is a mean over its width.
    max_distance : float
        Largest distance to the nearest star of the grid in (5040 K / Teff, log g, [Fe/H]), each divided by its
        standard deviation; the emulator refuses stars farther away, such as a supergiant of 6,500 K.
    interval_pixels : int
        If positive, the spectrum is cut into intervals of this number of pixels with a basis each, as a long spectrum
        at high resolution needs; 0: the components span the whole spectrum. The rest applies to intervals only.
    directions, continuum_directions : int
        Basis vectors of an interval, for the flux and for the logarithm of the continuum.
    continuum_components : int
        Components of the continuum, which share a covariance function of their own.
    regime_teff : list[float]
        Teff (K) of the borders between regimes, increasing. Each regime has its own components and covariances.
    regime_overlap : float
        Spectra of two regimes are blended this far (K) to either side of their border.
    regime_stars : list[list[int]]
        First star of each regime and the one after its last; the stars are sorted by Teff.
    """

    model_type = "spectrafm-emulator"

    label_names: list[str] | tuple[str, ...] = ("teff", "logg", "fe_h")
    label_units: list[str] | tuple[str, ...] = ("K", "dex", "dex")
    label_minimum: list[float | int] | tuple[float | int, ...] = (3500.0, 0.0, -2.0)
    label_maximum: list[float | int] | tuple[float | int, ...] = (6500.0, 5.0, 0.5)
    num_stars: int = 1
    num_pixels: int = 1
    component_groups: list[int] | tuple[int, ...] = (1,)
    fluxed: bool = False
    flux_unit: str = ""
    resolving_power: float | int = 0.0
    max_distance: float | int = 1.0
    interval_pixels: int = 0
    directions: int = 0
    continuum_directions: int = 0
    continuum_components: int = 0
    regime_teff: list[float | int] | tuple[float | int, ...] = ()
    regime_overlap: float | int = 0.0
    regime_stars: list[list[int]] | tuple[list[int], ...] = ()

    def to_dict(self) -> dict:
        """The fields, and the names of the code files in a checkpoint."""
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP)}

    def validate_emulator(self):
        """Runs at init and at save; an error names field, expectation and value."""

        def demand(condition, field, expectation):
            if not condition:
                raise ValueError(f"{field}: expected {expectation}, got {getattr(self, field)!r}")

        demand(
            list(self.label_names[:3]) == ["teff", "logg", "fe_h"], "label_names", "teff, logg and fe_h before others"
        )
        for field in ("label_units", "label_minimum", "label_maximum"):
            demand(len(getattr(self, field)) == len(self.label_names), field, f"{len(self.label_names)} entries")
        for field in ("num_stars", "num_pixels"):
            demand(getattr(self, field) >= 1, field, "at least 1")
        demand(all(n >= 1 for n in self.component_groups), "component_groups", "positive numbers")
        demand(self.interval_pixels >= 0, "interval_pixels", "at least 0")
        if not self.interval_pixels:
            return
        for field in ("directions", *(("continuum_directions", "continuum_components") if self.fluxed else ())):
            demand(getattr(self, field) >= 1, field, "at least 1")
        edges = list(self.regime_teff)
        apart = all(b - a >= 2 * self.regime_overlap for a, b in pairwise(edges))
        demand(apart and edges == sorted(set(edges)), "regime_teff", "rising Teff, two regime_overlap apart or more")
        demand(self.regime_overlap > 0 or not edges, "regime_overlap", "a positive number of K")
        parts = self.regime_stars
        valid = all(len(part) == 2 and 0 <= part[0] < part[1] <= self.num_stars for part in parts)
        demand(valid and len(parts) == len(edges) + 1, "regime_stars", f"{len(edges) + 1} pairs of star numbers")


SpectrumEmulatorConfig.register_for_auto_class()

__all__ = ["SpectrumEmulatorConfig"]
