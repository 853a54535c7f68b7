# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
An emulator of synthetic stellar spectra: labels -> spectrum, without radiative transfer.

Spectra of a grid are sums of principal components; the weight of each is a Gaussian process over the stellar labels,
of which only the mean is kept (the emulator of Czekala et al. 2015, ApJ 812, 128, with other covariance functions).
That is a fixed set of matrices: no more than two products with them and one exponential make a spectrum, and its
derivatives.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .configuration_emulator import SpectrumEmulatorConfig


REFERENCE_TEFF = 5040.0
CHUNK = 1024  # stars at once: the memory does not grow with their number


def default_vmicro(teff: ArrayLike, logg: ArrayLike) -> np.ndarray:
    """
    Usual microturbulence in km/s, in the shape of Teff (K) and log g: a cubic in log g for giants (log g below 3.5;
    a fit of APOGEE DR13, Holtzman et al. 2018, AJ 156, 125), a plane for dwarfs, at least 0.3.
    """
    teff, logg = np.asarray(teff, dtype=np.float64), np.asarray(logg, dtype=np.float64)
    giants = 10 ** (0.226 - 0.0228 * logg + 0.0297 * logg**2 - 0.0113 * logg**3)
    dwarfs = 1.0 + 2.5e-4 * (teff - 5500.0) - 0.35 * (logg - 4.2)
    return np.where(logg < 3.5, giants, dwarfs).clip(min=0.3)


class CovarianceGroup(nn.Module):
    """
    The mean of Gaussian processes that share one covariance function, given their stars.

    k(a, b) = s_0 a.P.b + s_1 (a.P.b + 1)^2 + s_2 exp(-|a - b|_Q^2 / 2) with diagonal P and Q: a smooth trend with each
    label, and what deviates from it.
    """

    def __init__(self, num_labels: int, num_stars: int, num_components: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(num_labels))
        self.log_length = nn.Parameter(torch.zeros(num_labels))
        self.log_amplitude = nn.Parameter(torch.zeros(3))
        self.weight = nn.Parameter(torch.zeros(num_stars, num_components))

    def covariance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(n, labels), (m, labels), both standardised, float64 -> (n, m)."""
        trend = (a * (2 * self.log_scale.double()).exp()) @ b.T
        lengths = self.log_length.double().exp()
        a, b = a / lengths, b / lengths
        distance = (a**2).sum(dim=1)[:, None] + (b**2).sum(dim=1) - 2 * a @ b.T
        linear, quadratic, local = self.log_amplitude.double().exp()
        return linear * trend + quadratic * (trend + 1.0) ** 2 + local * torch.exp(-0.5 * distance.clamp(min=0.0))

    def forward(self, labels: torch.Tensor, stars: torch.Tensor) -> torch.Tensor:
        """(n, labels), (stars, labels) -> (n, components). In float64: large terms cancel."""
        return self.covariance(labels, stars) @ self.weight.double()


class SpectrumEmulator(PreTrainedModel):
    """
    Labels -> synthetic spectrum; [`SpectrumEmulator.synthesize`] is the way in.

    Parameters
    ----------
    config : SpectrumEmulatorConfig
    """

    config_class = SpectrumEmulatorConfig
    base_model_prefix = "emulator"
    main_input_name = "labels"
    wavelength: torch.Tensor
    center: torch.Tensor
    scale: torch.Tensor
    stars: torch.Tensor
    mean: torch.Tensor
    components: torch.Tensor

    def __init__(self, config: SpectrumEmulatorConfig):
        super().__init__(config)
        num_labels, num_outputs = len(config.label_names), config.num_pixels * (1 + config.fluxed)
        self.register_buffer("wavelength", torch.zeros(config.num_pixels))
        self.register_buffer("center", torch.zeros(num_labels))
        self.register_buffer("scale", torch.ones(num_labels))
        self.register_buffer("stars", torch.zeros(config.num_stars, num_labels))
        self.register_buffer("mean", torch.zeros(num_outputs))
        self.register_buffer("components", torch.zeros(sum(config.component_groups), num_outputs))
        self.groups = nn.ModuleList(
            CovarianceGroup(num_labels, config.num_stars, size) for size in config.component_groups
        )
        self.post_init()

    def _init_weights(self, module):
        """Nothing is drawn: `emulation.fit_emulator` computes all of it."""

    def standardize(self, labels: torch.Tensor) -> torch.Tensor:
        """(n, labels) in physical units -> what the covariance sees; lines change with 5040 K / Teff."""
        labels = labels.double()
        features = torch.cat((REFERENCE_TEFF / labels[:, :1], labels[:, 1:]), dim=1)
        return (features - self.center.double()) / self.scale.double()

    def forward(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Spectra for labels, differentiable; nothing is checked.

        Parameters
        ----------
        labels : torch.FloatTensor of shape (n, labels)
            In physical units and in the order of `config.label_names`.

        Returns
        -------
        flux : torch.FloatTensor of shape (n, pixels)
            Divided by the continuum.
        continuum : torch.FloatTensor of shape (n, pixels), or None if not `config.fluxed`
            At the surface of the star, in `config.flux_unit`.
        """
        features = self.standardize(labels)
        weights = torch.cat([group(features, self.stars.double()) for group in self.groups], dim=1)
        outputs = torch.addmm(self.mean, weights.to(self.components.dtype), self.components)
        if not self.config.fluxed:
            return outputs, None
        flux, log_continuum = outputs.chunk(2, dim=1)
        return flux, log_continuum.exp()

    @torch.no_grad()
    def synthesize(self, *, normalized: bool | None = None, **labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """
        Spectra of n stars.

        Parameters
        ----------
        normalized : bool, optional
            Divide by the continuum; by default unless the emulator knows the continuum.
        **labels : float or array of shape (n,)
            `teff`, `logg` and `fe_h`, and any other of `config.label_names`. Abundances left out are solar ratios,
            `vmicro` left out is the usual one ([`default_vmicro`]).

        Returns
        -------
        wavelength : array of shape (pixels,), float64
            Angstrom, vacuum, rest frame.
        flux : array of shape (n, pixels), float32
            Divided by the continuum, or in `config.flux_unit` at the surface of the star.

        Raises
        ------
        ValueError
            For an unknown label, or one outside the range or too far from every star of the grid.
        """
        if normalized is None:
            normalized = not self.config.fluxed
        if not normalized and not self.config.fluxed:
            raise ValueError("normalized: expected True, as this emulator does not know the continuum, got False")
        table = self.label_table(labels)
        self.check(table)
        parts = []
        for start in range(0, len(table), CHUNK):
            chunk = torch.from_numpy(table[start : start + CHUNK]).to(self.wavelength.device)
            flux, continuum = self(chunk)
            parts.append((flux if normalized or continuum is None else flux * continuum).float().cpu().numpy())
        return self.wavelength.cpu().double().numpy(), np.concatenate(parts)

    def label_table(self, labels: Mapping[str, ArrayLike]) -> np.ndarray:
        """Labels by name -> (n, labels) in the order of the config, what was left out filled in; `ValueError`."""
        names = list(self.config.label_names)
        if unknown := [name for name in labels if name not in names]:
            raise ValueError(f"labels: expected names out of {names}, got {unknown}")
        if missing := [name for name in names[:3] if name not in labels]:
            raise ValueError(f"labels: expected at least {names[:3]}, got none for {missing}")
        given = {name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in labels.items()}
        lengths = {len(column) for column in given.values()} - {1} or {1}
        if len(lengths) > 1 or any(column.ndim != 1 for column in given.values()):
            shapes = {name: column.shape for name, column in given.items()}
            raise ValueError(f"labels: expected numbers or arrays of one length, got shapes {shapes}")
        given = {"vmicro": default_vmicro(given["teff"], given["logg"]), **given}
        (n,) = lengths
        columns = [np.broadcast_to(given.get(name, np.zeros(1)), (n,)) for name in names]
        return np.stack(columns, axis=1)

    def distance(self, table: np.ndarray) -> np.ndarray:
        """(n, labels) -> (n,): distance to the nearest star of the grid, see `config.max_distance`."""
        features = self.standardize(torch.from_numpy(table).to(self.wavelength.device))[:, :3]
        return torch.cdist(features, self.stars[:, :3].double()).amin(dim=1).cpu().numpy()

    def covers(self, table: np.ndarray) -> np.ndarray:
        """(n, labels) in the order of `config.label_names` -> (n,) bool: may be asked for."""
        low, high = self._range()
        inside: np.ndarray = np.all((table >= low) & (table <= high), axis=1)
        inside[inside] = self.distance(table[inside]) <= self.config.max_distance
        return inside

    def check(self, table: np.ndarray) -> None:
        """`ValueError` naming label, range and value for the first star that `covers` denies."""
        low, high = self._range()
        outside = ~((table >= low) & (table <= high))  # a NaN is outside
        if outside.any():
            star, label = map(int, np.argwhere(outside)[0])
            name, unit = self.config.label_names[label], self.config.label_units[label]
            raise ValueError(
                f"{name}: expected {low[label]:g} to {high[label]:g} {unit}".rstrip()
                + f", the range of the grid, got {table[star, label]:g} (star {star})"
            )
        distance = self.distance(table)
        if (far := distance > self.config.max_distance).any():
            star = int(np.argmax(far))
            teff, logg, fe_h = table[star, :3]
            raise ValueError(
                f"teff, logg, fe_h: expected a combination within {self.config.max_distance:g} of a star of the grid, "
                f"got {teff:g} K, {logg:g}, {fe_h:g} at a distance of {distance[star]:.2f} (star {star})"
            )

    def _range(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.config.label_minimum, dtype=float), np.array(self.config.label_maximum, dtype=float)


SpectrumEmulator.register_for_auto_class("AutoModel")

__all__ = ["SpectrumEmulator", "default_vmicro"]
