# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
An emulator of synthetic stellar spectra: labels -> spectrum, without radiative transfer.

Spectra of a grid are sums of principal components; the weight of each is a Gaussian process over the stellar labels,
of which only the mean is kept (the emulator of Czekala et al. 2015, ApJ 812, 128, with other covariance functions).
A spectrum and its derivatives therefore need only two products with fixed matrices and one exponential.

A long spectrum at high resolution is cut into intervals (`config.interval_pixels`), each with its own basis, and the
Gaussian processes predict the coefficients in all of these. Cool and warm stars, whose spectra differ strongly, have
separate Gaussian processes, and their spectra are blended at the border.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .configuration_emulator import SpectrumEmulatorConfig


REFERENCE_TEFF = 5040.0
CHUNK = 1024  # stars per batch, to limit memory


def default_vmicro(teff: ArrayLike, logg: ArrayLike) -> np.ndarray:
    """
    Typical microturbulence in km/s for Teff (K) and log g, in their shape: a cubic in log g for giants (log g < 3.5; a
    fit of APOGEE DR13, Holtzman et al. 2018, AJ 156, 125), a plane for dwarfs, at least 0.3.
    """
    teff, logg = np.asarray(teff, dtype=np.float64), np.asarray(logg, dtype=np.float64)
    giants = 10 ** (0.226 - 0.0228 * logg + 0.0297 * logg**2 - 0.0113 * logg**3)
    dwarfs = 1.0 + 2.5e-4 * (teff - 5500.0) - 0.35 * (logg - 4.2)
    return np.where(logg < 3.5, giants, dwarfs).clip(min=0.3)


class CovarianceGroup(nn.Module):
    """
    The mean of Gaussian processes that share one covariance function, given their stars.

    k(a, b) = s_0 a.P.b + s_1 (a.P.b + 1)^2 + s_2 exp(-|a - b|_Q^2 / 2) with diagonal P and Q: a smooth trend with each
    label, and local deviations from it.
    """

    def __init__(self, num_labels: int, num_stars: int, num_components: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(num_labels))
        self.log_length = nn.Parameter(torch.zeros(num_labels))
        self.log_amplitude = nn.Parameter(torch.zeros(3))
        self.weight = nn.Parameter(torch.zeros(num_stars, num_components))

    def as_buffers(self) -> "CovarianceGroup":
        """The same as a module without trainable parameters, which is never offloaded."""
        for name, value in list(self.named_parameters()):
            delattr(self, name)
            self.register_buffer(name, value.detach())
        return self

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


def quantize(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., n) -> integers (..., n) and steps (..., 1), whose product is the values to half a step."""
    steps = (values.abs().amax(dim=-1, keepdim=True) / torch.iinfo(dtype).max).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    return (values / steps).round().to(dtype), steps.float()


class Coefficients(nn.Module):
    """
    Labels of the stars of one regime -> coefficients in the bases of the intervals.

    The mean, plus components with Gaussian processes as weights. The components are integers times a step for each
    component and interval.
    """

    mean: torch.Tensor
    components: torch.Tensor
    steps: torch.Tensor

    def __init__(self, num_labels: int, num_stars: int, groups: list[int], shape: tuple[int, int]):
        super().__init__()
        self.groups = nn.ModuleList(CovarianceGroup(num_labels, num_stars, size) for size in groups)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("components", torch.zeros((sum(groups), *shape), dtype=torch.int16))
        self.register_buffer("steps", torch.zeros(sum(groups), shape[0], 1))

    def forward(self, features: torch.Tensor, stars: torch.Tensor, intervals: slice) -> torch.Tensor:
        """(n, labels), (stars, labels), both standardised -> (n, intervals, directions)."""
        weights = torch.cat([group(features, stars) for group in self.groups], dim=1).float()
        components, mean = self.components[:, intervals] * self.steps[:, intervals], self.mean[intervals]
        return torch.addmm(mean.flatten(), weights, components.flatten(1)).unflatten(1, mean.shape)


class SpectrumEmulator(PreTrainedModel):
    """
    Labels -> synthetic spectrum; use [`SpectrumEmulator.synthesize`].

    Parameters
    ----------
    config : SpectrumEmulatorConfig
    """

    config_class = SpectrumEmulatorConfig
    base_model_prefix = "emulator"
    main_input_name = "labels"
    # Half precision would move lines by more than their width, and a continuum is an exponential.
    _keep_in_fp32_modules_strict = ["wavelength", "center", "scale", "stars", "mean", "components", "groups", "steps"]
    _keep_in_fp32_modules_strict += ["basis_steps", "continuum_basis"]
    wavelength: torch.Tensor
    center: torch.Tensor
    scale: torch.Tensor
    stars: torch.Tensor
    mean: torch.Tensor
    components: torch.Tensor
    basis: torch.Tensor
    basis_steps: torch.Tensor
    continuum_basis: torch.Tensor

    def __init__(self, config: SpectrumEmulatorConfig):
        super().__init__(config)
        num_labels, num_outputs = len(config.label_names), config.num_pixels * (1 + config.fluxed)
        self.register_buffer("wavelength", torch.zeros(config.num_pixels))
        self.register_buffer("center", torch.zeros(num_labels))
        self.register_buffer("scale", torch.ones(num_labels))
        self.register_buffer("stars", torch.zeros(config.num_stars, num_labels))
        self.register_buffer("mean", torch.zeros(num_outputs))
        if config.interval_pixels:
            self._add_intervals(config)
        else:
            self.register_buffer("components", torch.zeros(sum(config.component_groups), num_outputs))
            self.groups = nn.ModuleList(
                CovarianceGroup(num_labels, config.num_stars, size) for size in config.component_groups
            )
        self.post_init()

    def _add_intervals(self, config: SpectrumEmulatorConfig):
        size, num_labels = config.interval_pixels, len(config.label_names)
        intervals = -(-config.num_pixels // size)
        self.register_buffer("basis", torch.zeros(intervals, config.directions, size, dtype=torch.int8))
        self.register_buffer("basis_steps", torch.zeros(intervals, config.directions, 1))
        counts = [last - first for first, last in config.regime_stars]
        groups, shape = list(config.component_groups), (intervals, config.directions)
        self.regimes = nn.ModuleList(Coefficients(num_labels, n, groups, shape) for n in counts)
        if config.fluxed:
            shape = (intervals, config.continuum_directions)
            self.register_buffer("continuum_basis", torch.zeros(*shape, size))
            self.continuum_regimes = nn.ModuleList(
                Coefficients(num_labels, n, [config.continuum_components], shape) for n in counts
            )

    def _apply(self, fn, recurse=True):
        """To another device or to float64, never to half precision: see `_keep_in_fp32_modules_strict`."""

        def wide(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(wide, recurse)

    def _init_weights(self, module):
        """No random initialisation: `emulation.fit_emulator` computes all weights."""

    def standardize(self, labels: torch.Tensor) -> torch.Tensor:
        """(n, labels) in physical units -> features of the covariance; lines change with 5040 K / Teff."""
        labels = labels.double()
        features = torch.cat((REFERENCE_TEFF / labels[:, :1], labels[:, 1:]), dim=1)
        return (features - self.center.double()) / self.scale.double()

    def forward(
        self, labels: torch.Tensor, wavelength_range: tuple[float, float] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Spectra for labels, differentiable; the labels are not checked.

        Parameters
        ----------
        labels : torch.FloatTensor of shape (n, labels)
            In physical units and in the order of `config.label_names`.
        wavelength_range : (float, float), optional
            Lowest and highest wavelength (Angstrom, vacuum): only these pixels, faster. By default all.

        Returns
        -------
        flux : torch.FloatTensor of shape (n, pixels)
            Divided by the continuum.
        continuum : torch.FloatTensor of shape (n, pixels), or None if not `config.fluxed`
            At the surface of the star, in `config.flux_unit`.
        """
        features, pixels = self.standardize(labels), self.pixels(wavelength_range)
        if self.config.interval_pixels:
            return self._of_intervals(labels, features, pixels)
        weights = torch.cat([group(features, self.stars.double()) for group in self.groups], dim=1)
        mean, components = self.mean, self.components
        if wavelength_range is not None:
            chosen = torch.arange(self.config.num_pixels, device=mean.device)[pixels]
            if self.config.fluxed:
                chosen = torch.cat((chosen, chosen + self.config.num_pixels))
            mean, components = mean[chosen], components[:, chosen]
        outputs = torch.addmm(mean, weights.to(components.dtype), components)
        if not self.config.fluxed:
            return outputs, None
        flux, log_continuum = outputs.chunk(2, dim=1)
        return flux, log_continuum.exp()

    def positive(
        self, labels: torch.Tensor, wavelength_range: tuple[float, float] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As `forward`, without flux below zero: in some saturated lines it is smaller than the error of the emulator.
        """
        flux, continuum = self(labels, wavelength_range)
        return flux.clamp(min=0.0), continuum

    def _of_intervals(self, labels: torch.Tensor, features: torch.Tensor, pixels: slice):
        size = self.config.interval_pixels
        intervals = slice(pixels.start // size, -(-pixels.stop // size))
        mean = self.mean.unflatten(0, (-1, self.config.num_pixels))[:, pixels]

        def spectrum(regimes, basis, level):
            coefficients = self._blend(regimes, labels, features, intervals).transpose(0, 1)
            joined = (coefficients @ basis).transpose(0, 1).flatten(1)  # intervals, n, size -> n, pixels
            start = intervals.start * size
            return joined[:, pixels.start - start : pixels.stop - start] + level

        flux = spectrum(self.regimes, self.basis[intervals] * self.basis_steps[intervals], mean[0])
        if not self.config.fluxed:
            return flux, None
        return flux, spectrum(self.continuum_regimes, self.continuum_basis[intervals], mean[1]).exp()

    def _blend(self, regimes, labels: torch.Tensor, features: torch.Tensor, intervals: slice) -> torch.Tensor:
        """Coefficients (n, intervals, directions), from the regimes with a weight above zero for each star."""
        parts, rows = [], []
        for share, regime, (first, last) in zip(
            self.shares(labels[:, 0]).T, regimes, self.config.regime_stars, strict=True
        ):
            (chosen,) = torch.nonzero(share, as_tuple=True)
            part = regime(features[chosen], self.stars[first:last].double(), intervals)
            parts.append(part * share[chosen].to(part.dtype)[:, None, None])
            rows.append(chosen)
        together = torch.cat(parts)
        return together.new_zeros(len(labels), *together.shape[1:]).index_add(0, torch.cat(rows), together)

    def shares(self, teff: torch.Tensor) -> torch.Tensor:
        """Teff (K) of shape (n,) -> (n, regimes): weights in a blend, smooth in Teff, of sum 1."""
        edges = torch.tensor(list(self.config.regime_teff), dtype=torch.float64, device=teff.device)
        x = ((teff.double()[:, None] - edges) / (2 * (self.config.regime_overlap or 1.0)) + 0.5).clamp(0.0, 1.0)
        above = x**2 * (3 - 2 * x)
        one, none = above.new_ones(len(teff), 1), above.new_zeros(len(teff), 1)
        return torch.cat((one, above), dim=1) - torch.cat((above, none), dim=1)

    def pixels(self, wavelength_range: tuple[float, float] | None) -> slice:
        """The pixels between two wavelengths (Angstrom, vacuum), or all; `ValueError` if there are none."""
        if wavelength_range is None:
            return slice(0, self.config.num_pixels)
        low, high = wavelength_range
        inside = torch.nonzero((self.wavelength >= low) & (self.wavelength <= high))
        if not len(inside):
            first, last = float(self.wavelength[0]), float(self.wavelength[-1])
            raise ValueError(
                f"wavelength_range: expected lowest and highest within {first:g} to {last:g} Angstrom, "
                f"got {low:g} to {high:g}"
            )
        return slice(int(inside[0]), int(inside[-1]) + 1)

    @torch.no_grad()
    def synthesize(
        self,
        *,
        normalized: bool | None = None,
        wavelength_range: tuple[float, float] | None = None,
        **labels: ArrayLike,
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Spectra of n stars.

        Parameters
        ----------
        normalized : bool, optional
            Divide by the continuum; by default only if the emulator has no continuum.
        wavelength_range : (float, float), optional
            Lowest and highest wavelength (Angstrom, vacuum): only these pixels, faster. By default all.
        **labels : float or array of shape (n,)
            `teff`, `logg` and `fe_h`, and any other of `config.label_names`. Default: solar abundance ratios, and
            `vmicro` from [`default_vmicro`].

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
            raise ValueError("normalized: expected True, because this emulator has no continuum, got False")
        table = self.label_table(labels)
        self.check(table)
        parts = []
        for start in range(0, len(table), CHUNK):
            chunk = torch.from_numpy(table[start : start + CHUNK]).to(self.wavelength.device)
            flux, continuum = self.positive(chunk, wavelength_range)
            parts.append((flux if normalized or continuum is None else flux * continuum).float().cpu().numpy())
        return self.wavelength[self.pixels(wavelength_range)].cpu().double().numpy(), np.concatenate(parts)

    def label_table(self, labels: Mapping[str, ArrayLike]) -> np.ndarray:
        """Labels by name -> (n, labels) in the order of the config, with defaults filled in; raises ValueError."""
        names = list(self.config.label_names)
        if unknown := [name for name in labels if name not in names]:
            raise ValueError(f"labels: expected names out of {names}, got {unknown}")
        if missing := [name for name in names[:3] if name not in labels]:
            raise ValueError(f"labels: expected at least {names[:3]}, got none for {missing}")
        values = {name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in labels.items()}
        lengths = {len(column) for column in values.values()} - {1} or {1}
        if len(lengths) > 1 or any(column.ndim != 1 for column in values.values()):
            shapes = {name: column.shape for name, column in values.items()}
            raise ValueError(f"labels: expected numbers or arrays of one length, got shapes {shapes}")
        values = {"vmicro": default_vmicro(values["teff"], values["logg"]), **values}
        (n,) = lengths
        columns = [np.broadcast_to(values.get(name, np.zeros(1)), (n,)) for name in names]
        return np.stack(columns, axis=1)

    def distance(self, table: np.ndarray) -> np.ndarray:
        """(n, labels) -> (n,): distance to the nearest star of the grid, see `config.max_distance`."""
        features = self.standardize(torch.from_numpy(table).to(self.wavelength.device))[:, :3]
        return torch.cdist(features, self.stars[:, :3].double()).amin(dim=1).cpu().numpy()

    def covers(self, table: np.ndarray) -> np.ndarray:
        """(n, labels) in the order of `config.label_names` -> (n,) bool: whether it is within the grid."""
        low, high = self._range()
        inside: np.ndarray = np.all((table >= low) & (table <= high), axis=1)
        inside[inside] = self.distance(table[inside]) <= self.config.max_distance
        return inside

    def check(self, table: np.ndarray) -> None:
        """`ValueError` naming label, range and value for the first star that is not covered."""
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
