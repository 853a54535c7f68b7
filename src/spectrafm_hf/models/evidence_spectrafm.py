# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The network on evidence: what is known of all intervals of a spectrum is completed to what is known of the star.

Neighbouring intervals of a star go together. Principal components of stars, over all intervals of a rung, and their
spread among stars are a prior; with what each coefficient tells, by its reliability, the most likely amplitude of each
component follows by least squares. An interval without pixels is filled in from the others, as far as they tell of it.

Then some small networks, the members, each with weights of its own, go from these amplitudes to labels. Their answers
are averaged. Attention between the few intervals of a spectrum was tried in their place: see the model card.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_spectrafm import SpectraFMConfig


MOST_RELIABLE = 0.9999
LARGE = 4.0  # of the spread of an amplitude: beyond, it counts less and less


class InFullPrecision(nn.Module):
    """A module that is never brought to half precision: linear algebra before the first learnt layer."""

    def _apply(self, fn, recurse=True):
        def wide(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(wide, recurse)


class SpectraFMCompletion(InFullPrecision):
    """
    Coefficients of any intervals of a rung -> amplitudes of the principal components of stars.

    Nothing of it is trained: `bases.fill_completion` computes it.
    """

    center: torch.Tensor
    metric: torch.Tensor
    components: torch.Tensor
    spread: torch.Tensor
    middle: torch.Tensor
    scale: torch.Tensor

    def __init__(self, config: SpectraFMConfig, rung: int):
        super().__init__()
        self.first, last = config.rung_intervals[rung]
        shape, size = (last - self.first, config.num_coefficients), config.rung_components[rung]
        self.register_buffer("center", torch.zeros(shape))  # of the coefficients among stars
        self.register_buffer("metric", torch.ones(shape))  # how much each counts in the components
        self.register_buffer("components", torch.zeros(*shape, size))
        self.register_buffer("spread", torch.ones(size))  # of the amplitudes among stars
        # Of the amplitudes as they are found, for the network.
        self.register_buffer("middle", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    @property
    def num_features(self) -> int:
        return len(self.spread) + len(self.center)

    def amplitudes(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, intervals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (B, T, K) twice, numbers of intervals of this rung (T,) -> amplitudes (B, components), and what the fit leaves
        and the prior costs, per coefficient and component, (B,): about 1 or less for a star.
        """
        own = intervals - self.first
        metric = self.metric[own].flatten()
        directions = self.components[own].flatten(0, 1) / metric[:, None]
        center = self.center[own].flatten()
        known = reliability.float().clamp(0.0, MOST_RELIABLE).flatten(1)
        given = coefficients.float().flatten(1)
        inverse = 1.0 / (1.0 - known)
        size = directions.shape[1]
        products = (directions[:, :, None] * directions[:, None, :]).flatten(1)
        gram = ((known * inverse) @ products).unflatten(1, (size, size))
        gram.diagonal(dim1=1, dim2=2).add_(self.spread**-2.0)
        right = ((given - known * center) * inverse) @ directions
        # With a diagonal of one, single precision suffices.
        unit = torch.rsqrt(gram.diagonal(dim1=1, dim2=2))
        gram = gram * unit[:, :, None] * unit[:, None, :]
        factor = torch.linalg.cholesky_ex(gram).L
        found = torch.cholesky_solve((right * unit)[..., None], factor)[..., 0] * unit
        left = given - known * (center + found @ directions.T)
        cost = (left**2 / (known * (1.0 - known) + (0.02 * known) ** 2 + 1e-6)).sum(dim=1)
        number = (known > 0).sum(dim=1)
        return found, (cost + ((found / self.spread) ** 2).sum(dim=1)) / (number + size)

    def forward(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, intervals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`amplitudes`]; the amplitudes scaled, and how well each interval is known beside them."""
        with torch.autocast(coefficients.device.type, enabled=False):
            found, cost = self.amplitudes(coefficients, reliability, intervals)
        scaled = (found - self.middle) / self.scale
        size = scaled.abs()
        scaled = torch.where(size < LARGE, scaled, scaled.sign() * (LARGE + torch.log1p((size - LARGE).clamp(min=0.0))))
        known = torch.zeros(len(found), len(self.center), device=found.device)
        known[:, intervals - self.first] = reliability.float().clamp(0.0, 1.0).mean(dim=2)
        return torch.cat((scaled, torch.log(1.02 - known)), dim=1), cost


class SpectraFMMemberLinear(nn.Module):
    """A linear layer with weights of its own for each member: (M, B, in_features) -> (M, B, out_features)."""

    def __init__(self, num_members: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_members, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(num_members, 1, out_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, hidden_states.to(self.weight.dtype), self.weight)


class SpectraFMMemberBlock(nn.Module):
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
        self.embedding = SpectraFMMemberLinear(config.num_members, self.completion.num_features, config.hidden_size)
        self.blocks = nn.ModuleList(SpectraFMMemberBlock(config, ffn_dim) for ffn_dim in config.encoder_ffn_dim)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, intervals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, K) twice, (T,) -> states (B, M, hidden_size), and the cost of the completion (B,)."""
        features, cost = self.completion(coefficients, reliability, intervals)
        hidden_states = self.embedding(features.expand(self.num_members, -1, -1))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.activation_fn(self.layer_norm(hidden_states)).transpose(0, 1), cost


class SpectraFMMemberHead(nn.Module):
    """What the members say of each row of a vocabulary: (B, M, hidden_size) -> (B, M, rows), float32."""

    def __init__(self, config: SpectraFMConfig, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_members, config.hidden_size, rows))
        self.bias = nn.Parameter(torch.zeros(config.num_members, rows))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # In float32 whatever the dtype of the model, and of autocast: half precision would round it to several Kelvin.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return torch.einsum("bmh,mhr->bmr", hidden_states.float(), self.weight.float()) + self.bias.float()

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
    "SpectraFMMemberHead",
    "SpectraFMMemberLinear",
    "SpectraFMRung",
]
