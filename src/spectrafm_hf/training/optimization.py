# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Optimizer and running mean of the weights."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.products_spectrafm import products


#: Parts of the names of matrices that do not map hidden states to hidden states.
NOT_HIDDEN = ("value_embedding", "readout.mean", "readout.log_variance", "means.", "log_variances.", "start.")


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """
    Trainable parameters for Muon (matrices inside the layers), and for AdamW with and without weight decay.

    Muon makes the update of a matrix orthogonal, which suits matrices between hidden states. Embeddings, read-out
    heads, LoRA factors, biases and norms are trained with AdamW.
    """
    muon, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        outside = any(part in name for part in NOT_HIDDEN)
        # Parameters with three dimensions are stacked matrices of ensemble members; their biases have one row.
        if not outside and (parameter.ndim == 2 or (parameter.ndim == 3 and parameter.shape[1] > 1)):
            muon.append(parameter)
        elif parameter.ndim >= 2:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    return muon, decayed, plain


#: Coefficients of the polynomial that moves singular values towards 1 (Jordan et al. 2024, "Muon").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or stack of matrices, with the same singular vectors and singular values between 0.7 and 1.2."""
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    stack = wide if wide.ndim == 3 else wide[None]
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = products(stack, stack.mT)
        stack = products(gram.mul(b).add_(products(gram, gram), alpha=c), stack).add_(stack, alpha=a)
    wide = stack if wide.ndim == 3 else stack[0]
    return wide.mT if matrix.shape[-2] > matrix.shape[-1] else wide


class Muon(torch.optim.Optimizer):
    """
    Orthogonalised momentum for matrices: [`torch.optim.Muon`] with `adjust_lr_fn="match_rms_adamw"`, in float32.

    The one of torch computes in bfloat16, which takes twice as long on a CPU. Its rounding also makes runs diverge that
    differ only by the order of sums, such as runs on one and on two processes.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], momentum: float = 0.95):
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(mean, group["momentum"]))
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                # Scaled to the RMS of updates of AdamW, so that learning rates are comparable.
                parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape[-2:]) ** 0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """
    [`Muon`] for hidden matrices and [`torch.optim.AdamW`] for the rest, as one optimizer.

    The Trainer, its schedulers and its checkpoints expect one optimizer with parameter groups. The two inner optimizers
    share these groups, so that a scheduler sets their learning rates too.
    """

    def __init__(self, muon_group: dict[str, Any], adamw_groups: Sequence[dict[str, Any]], betas=(0.9, 0.98)):
        adamw_groups = [group for group in adamw_groups if group["params"]]
        self.inner: list[torch.optim.Optimizer] = []
        # Either may have no parameters if parts of the model are frozen.
        if muon_group["params"]:
            self.inner.append(Muon([muon_group]))
        if adamw_groups:
            self.inner.append(torch.optim.AdamW(adamw_groups, betas=betas))
        groups = [group for optimizer in self.inner for group in optimizer.param_groups]
        super().__init__(groups, {})
        self._share_groups()

    def _share_groups(self):
        first = 0
        for optimizer in self.inner:
            last = first + len(optimizer.param_groups)
            optimizer.param_groups, optimizer.state = self.param_groups[first:last], self.state
            first = last

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for optimizer in self.inner:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share_groups()


class Ema:
    """Running mean of the trained weights; it replaces them in evaluation and in the final model."""

    def __init__(self, decay: float, model: nn.Module):
        self.decay = decay
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int):
        """Update the mean after step number `step`, counted from 1."""
        # A small decay at first, so that the random initial weights do not remain in the mean.
        decay = min(self.decay, (step + 1) / (step + 10))
        weights = {name: p for name, p in model.named_parameters() if name in self.mean}
        torch._foreach_lerp_([self.mean[name] for name in weights], list(weights.values()), 1.0 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module):
        """Exchange the weights of the model with their mean; a second call restores them."""
        for name, parameter in model.named_parameters():
            if name in self.mean:
                parameter.data, self.mean[name] = self.mean[name], parameter.data

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Use the mean as the weights of the model."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.mean

    def load_state_dict(self, state: Mapping[str, torch.Tensor]):
        if state.keys() != self.mean.keys():
            raise ValueError(f"ema: expected the mean of {len(self.mean)} weights, got {len(state)} of other names")
        self.mean = {name: state[name].to(mean.device) for name, mean in self.mean.items()}
