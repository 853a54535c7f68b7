# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The network on evidence: the evidence of a spectrum is completed to all intervals, and mapped to labels.

The intervals of a star are correlated. The prior is the principal components of stars over all intervals of a rung, and
their spread; with the coefficients and their reliability, the most likely amplitude of each component follows by least
squares. An interval without pixels is filled in from the others, as far as they are correlated.
Where flux spans decades within a spectrum, as in Gaia XP, the completed spectrum is computed on one grid, and the
network sees principal components of its asinh, in which extinction is additive.

Several small networks with different weights, the members, map these amplitudes to labels, and their predictions are
averaged. The model card describes a test with attention between intervals instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_spectrafm import SpectraFMConfig
from .products_spectrafm import product, products


MOST_RELIABLE = 0.9999
# Block sizes of a Cholesky factor, for small matrices and for those larger than the third number (110 columns by 32
# take 70 % of the time by 16), and the number of stars whose factors fit into a cache.
PANEL, LARGE_PANEL, SMALL, STARS_AT_ONCE = 16, 32, 64, 256
LARGE = 4.0  # of the spread of an amplitude: larger ones are compressed
LEAST_UNKNOWN = 1e-5  # of the prior variance of a coefficient
MEAN_FLUX = 0.01  # of the level of the star, at least
BRIGHTEST = 5.0  # of ln of the level of an interval over that of the star


class InFullPrecision(nn.Module):
    """A module that is never brought to half precision: linear algebra before the first learnt layer."""

    def _apply(self, fn, recurse=True):
        def wide(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(wide, recurse)

    @torch.no_grad()
    def reset(self, ones: Sequence[str] = ()) -> None:
        """What the buffers are before they are filled: zeros, and ones for those named."""
        for name, buffer in self.named_buffers(recurse=False):
            (init.ones_ if name in ones else init.zeros_)(buffer)


class SpectraFMCompletion(InFullPrecision):
    """
    Coefficients of any intervals of a rung -> amplitudes of the principal components of stars, and from them, with
    `config.rung_pixels`, principal components of asinh of the completed flux.

    It is not trained: `bases.fill_completion` computes it.
    """

    center: torch.Tensor
    metric: torch.Tensor
    components: torch.Tensor
    spread: torch.Tensor
    middle: torch.Tensor
    scale: torch.Tensor
    noise_middle: torch.Tensor
    noise_scale: torch.Tensor
    level_prior: torch.Tensor
    pixels: torch.Tensor
    flux_center: torch.Tensor
    flux_components: torch.Tensor

    def __init__(self, config: SpectraFMConfig, rung: int):
        super().__init__()
        self.first, last = config.rung_intervals[rung]
        shape, size = (last - self.first, config.num_coefficients), config.rung_components[rung]
        self.register_buffer("center", torch.zeros(shape))  # of the coefficients among stars
        self.register_buffer("metric", torch.ones(shape))  # how much each counts in the components
        self.register_buffer("components", torch.zeros(*shape, size))
        self.register_buffer("spread", torch.ones(size))  # of the amplitudes among stars
        self.num_pixels = config.rung_pixels[rung] if config.rung_pixels else 0
        self.softening = float(config.flux_softening)
        if self.num_pixels:
            self.register_buffer("level_prior", torch.ones(()))
            self.register_buffer("pixels", torch.zeros(*shape, self.num_pixels))  # the flux that a coefficient adds
            self.register_buffer("flux_center", torch.zeros(self.num_pixels))
            self.register_buffer("flux_components", torch.zeros(self.num_pixels, config.rung_features[rung]))
        # Of the features from the amplitudes, and of ln of the unknown part of each interval, for the network.
        seen = config.rung_features[rung] if self.num_pixels else size
        self.register_buffer("middle", torch.zeros(seen))
        self.register_buffer("scale", torch.ones(seen))
        self.register_buffer("noise_middle", torch.zeros(shape[0]))
        self.register_buffer("noise_scale", torch.ones(shape[0]))
        self._kept: tuple[Any, tuple[torch.Tensor, list[torch.Tensor]]] | None = None

    def _directions(self, own: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Coefficients of each component, (N, C), of some intervals, and their [`pairs`]; cached.
        """
        parts = self.components, self.metric
        usual = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
        if usual or any(part.is_inference() or part.requires_grad for part in parts):
            return self._made_directions(own)
        state = [own.tolist(), *((part.data_ptr(), part._version, part.dtype) for part in parts)]
        kept = self._kept
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = state, self._made_directions(own.clone())
        return kept[1]

    def _made_directions(self, own: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        directions = self.components[own].flatten(0, 1) / self.metric[own].flatten()[:, None]
        return directions, pairs(directions)

    def reset(self, ones: Sequence[str] = ("metric", "spread", "level_prior", "scale", "noise_scale")) -> None:
        super().reset(ones)

    @property
    def num_features(self) -> int:
        return len(self.middle) + len(self.center)

    def amplitudes(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, intervals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (B, T, K) twice, numbers of intervals of this rung (T,) -> amplitudes (B, components), and the cost (chi^2 of
        the fit plus the prior term, per coefficient and component), (B,): about 1 or less for a star.
        """
        own = intervals - self.first
        directions, products = self._directions(own)
        center = self.center[own].flatten()
        known = reliability.float().clamp(0.0, MOST_RELIABLE).flatten(1)
        flat = coefficients.float().flatten(1)
        inverse = 1.0 / (1.0 - known)
        size = directions.shape[1]
        right = ((flat - known * center) * inverse) @ directions
        found = solve_normal_equations(known * inverse, directions, self.spread**-2.0, right, products)
        left = flat - known * (center + found @ directions.T)
        cost = (left**2 / (known * (1.0 - known) + (0.02 * known) ** 2 + 1e-6)).sum(dim=1)
        number = (known > 0).sum(dim=1)
        return found, (cost + ((found / self.spread) ** 2).sum(dim=1)) / (number + size)

    def compressed_flux(self, amplitudes: torch.Tensor) -> torch.Tensor:
        """Amplitudes (B, components) -> asinh of the flux over its mean and the softening (B, pixels)."""
        metric = self.metric.flatten()
        completed = self.center.flatten() + (amplitudes @ self.components.flatten(0, 1).T) / metric
        completed = completed.unflatten(1, self.center.shape)
        level = torch.exp((self.level_prior * completed[..., :1]).clamp(-BRIGHTEST, BRIGHTEST))
        parts = torch.cat((level, level * completed[..., 1:]), dim=2)
        flux = parts.flatten(1) @ self.pixels.flatten(0, 1)
        flux = flux / flux.mean(dim=1, keepdim=True).clamp(min=MEAN_FLUX)
        return torch.asinh(flux / self.softening)

    def summary(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, intervals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As [`amplitudes`]; features (B, features), ln of the unknown part (B, intervals), cost."""
        with torch.autocast(coefficients.device.type, enabled=False):
            found, cost = self.amplitudes(coefficients, reliability, intervals)
            if self.num_pixels:
                found = (self.compressed_flux(found) - self.flux_center) @ self.flux_components
            unknown = torch.zeros(found.shape[0], len(self.center), device=found.device)
            rest = (1.0 - reliability.float()).clamp(LEAST_UNKNOWN, 1.0)
            unknown[:, intervals - self.first] = torch.log(rest).mean(dim=2)
        return found, unknown, cost

    def forward(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, intervals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        As [`amplitudes`]; inputs of the network (B, num_features), scaled, the cost, and the mean of ln(1 -
        reliability) over all intervals of the rung (B,).
        """
        found, unknown, cost = self.summary(coefficients, reliability, intervals)
        scaled = (found - self.middle) / self.scale
        size = scaled.abs()
        scaled = torch.where(size < LARGE, scaled, scaled.sign() * (LARGE + torch.log1p((size - LARGE).clamp(min=0.0))))
        noise = (unknown - self.noise_middle) / self.noise_scale
        return torch.cat((scaled, noise), dim=1), cost, unknown.mean(dim=1)


def pairs(directions: torch.Tensor) -> list[torch.Tensor]:
    """Products of each pair of directions (N, C), by panels of columns of their sum, (pairs, N) each."""
    size = directions.shape[1]
    width = PANEL if size <= SMALL else LARGE_PANEL
    return [
        (directions[:, start:, None] * directions[:, None, start : start + width]).flatten(1).T.contiguous()
        for start in range(0, size, width)
    ]


def solve_normal_equations(
    weight: torch.Tensor,
    directions: torch.Tensor,
    precision: torch.Tensor,
    right: torch.Tensor,
    products: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Least squares of many stars with the same directions: weights (B, N), directions (N, C), inverse variances of the
    prior (C,), right sides (B, C) -> (directions^T weight directions + precision)^-1 right, (B, C). The [`pairs`] of
    the directions are optional.

    Uses a Cholesky factorisation by panels of columns, for many stars at once; LAPACK, star by star, takes three times
    as long for matrices of this size. One step of refinement in double precision follows, so that the last digits do
    not depend on the processor or the runtime.
    """
    width = PANEL if len(precision) <= SMALL else LARGE_PANEL
    products = pairs(directions) if products is None else products
    prior = precision.split(width)

    def solve(weight, right):
        factor = _factor_by_panels(weight, products, prior)
        found = _solve_by_panels(factor, right)
        if found.device.type == "mps":  # has no double precision
            return found
        wide, exact = found.double(), directions.double()
        left = right - precision * wide - (weight * (wide @ exact.T)) @ exact
        return found + _solve_by_panels(factor, left.to(right.dtype))

    if torch.compiler.is_exporting():  # the number of parts would be fixed
        return solve(weight, right)
    parts = zip(weight.split(STARS_AT_ONCE), right.split(STARS_AT_ONCE), strict=True)
    return torch.cat([solve(*part) for part in parts])


def _factor_by_panels(weight, products, precision) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Panels of the lower factor, from its diagonal down, and inverses of its diagonal blocks."""
    panels: list[torch.Tensor] = []
    inverses: list[torch.Tensor] = []
    for number, (pairs, prior) in enumerate(zip(products, precision, strict=True)):
        width = len(prior)
        panel = product(weight, pairs).unflatten(1, (-1, width))
        panel.diagonal(dim1=1, dim2=2).add_(prior)
        for i, earlier in enumerate(panels):
            rows = earlier[:, (number - i) * len(precision[0]) :]
            panel.baddbmm_(rows, rows[:, :width].mT, alpha=-1.0)
        lower = torch.linalg.cholesky_ex(panel[:, :width]).L
        unit = torch.eye(width, dtype=lower.dtype, device=lower.device)
        inverses.append(torch.linalg.solve_triangular(lower, unit, upper=False))
        panels.append(panel @ inverses[-1].mT)
    return panels, inverses


def _solve_by_panels(factor: tuple[list[torch.Tensor], list[torch.Tensor]], right: torch.Tensor) -> torch.Tensor:
    panels, inverses = factor
    left, found = right[..., None], []
    for panel, inverse in zip(panels, inverses, strict=True):
        found.append(inverse @ left[:, : inverse.shape[1]])
        width = inverse.shape[1]
        left = torch.baddbmm(left[:, width:], panel[:, width:], found[-1], alpha=-1.0)
    for i in reversed(range(len(panels))):
        if i + 1 < len(panels):
            found[i] = found[i] - panels[i][:, inverses[i].shape[1] :].mT @ torch.cat(found[i + 1 :], dim=1)
        found[i] = inverses[i].mT @ found[i]
    return torch.cat(found, dim=1)[..., 0]


class SpectraFMMemberLinear(nn.Module):
    """A linear layer with separate weights for each member: (M, B, in_features) -> (M, B, out_features)."""

    def __init__(self, num_members: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_members, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(num_members, 1, out_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The dtype of the bias, as a quantised weight is of integers.
        return products(hidden_states.to(self.bias.dtype), self.weight, self.bias)


class SpectraFMMemberEmbedding(InFullPrecision, SpectraFMMemberLinear):
    """The first layer, whose inputs have more digits than half precision: float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states)


class SpectraFMMemberBlock(GradientCheckpointingLayer):
    """LayerNorm and feed-forward with a residual, of each member."""

    def __init__(self, config: SpectraFMConfig, ffn_dim: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = SpectraFMMemberLinear(config.num_members, config.hidden_size, ffn_dim)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.fc2 = SpectraFMMemberLinear(config.num_members, ffn_dim, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.activation_fn(self.fc1(self.layer_norm(hidden_states)))
        return hidden_states + self.fc2(self.dropout(inner))


class SpectraFMRung(nn.Module):
    """From the evidence of the intervals of one rung to a state of each member."""

    def __init__(self, config: SpectraFMConfig, rung: int):
        super().__init__()
        self.num_members = config.num_members
        self.completion = SpectraFMCompletion(config, rung)
        self.embedding = SpectraFMMemberEmbedding(config.num_members, self.completion.num_features, config.hidden_size)
        widths = config.rung_ffn_dim[rung] if config.rung_ffn_dim else config.encoder_ffn_dim
        self.blocks = nn.ModuleList(SpectraFMMemberBlock(config, ffn_dim) for ffn_dim in widths)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, intervals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, K) twice, (T,) -> states (B, M, hidden_size), and cost and unknown of the completion (B,)."""
        features, cost, unknown = self.completion(coefficients, reliability, intervals)
        hidden_states = self.embedding(features.expand(self.num_members, -1, -1)).to(self.layer_norm.weight.dtype)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.activation_fn(self.layer_norm(hidden_states)).transpose(0, 1), cost, unknown


class SpectraFMMemberHead(InFullPrecision):
    """Outputs of the members for each row of a vocabulary: (B, M, hidden_size) -> (B, M, rows), float32."""

    def __init__(self, config: SpectraFMConfig, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_members, config.hidden_size, rows))
        self.bias = nn.Parameter(torch.zeros(config.num_members, rows))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Half precision would round a temperature to several Kelvin.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return torch.einsum("bmh,mhr->bmr", hidden_states.float(), self.weight) + self.bias

    @torch.no_grad()
    def add_row(self) -> None:
        """One more row, of zeros."""
        weight, bias = self.weight, self.bias
        self.weight = nn.Parameter(nn.functional.pad(weight, (0, 1)), requires_grad=weight.requires_grad)
        self.bias = nn.Parameter(nn.functional.pad(bias, (0, 1)), requires_grad=bias.requires_grad)


__all__ = [
    "InFullPrecision",
    "SpectraFMCompletion",
    "SpectraFMMemberBlock",
    "SpectraFMMemberEmbedding",
    "SpectraFMMemberHead",
    "SpectraFMMemberLinear",
    "SpectraFMRung",
]
