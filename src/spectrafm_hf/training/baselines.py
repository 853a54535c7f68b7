# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Classical models that infer stellar labels from spectra, to compare SpectraFM with.

Ridge regression (spectrum -> labels), a quadratic model in the manner of The Cannon (labels -> spectrum, inverted; Ness
et al. 2015, ApJ 808, 16), boosted trees on principal components (spectrum -> labels), and a multilayer perceptron on
pixels and principal components (spectrum -> labels).

All have the same input as SpectraFM: flux and flux error, on one wavelength grid. Each returns a raw error for each
label: 1 for ridge and the trees, which predict no errors, the formal error of the fit for the Cannon, which ignores
correlated misfits of neighbouring pixels, and the predicted error for the MLP. For all models, `calibrate` multiplies
the raw errors of each label by one factor, so that the robust scatter of error/sigma is 1 on held-out (validation)
stars.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..models.modeling_spectrafm import prediction_loss
from ..statistics import robust_scatter
from .baseline import Baseline, FloatArray, PixelInputs, Spectra, Standardizer
from .cannon import CannonBaseline


class RidgeBaseline(Baseline):
    """Linear regression of each label on the pixels, with a penalty on squared weights.

    Parameters
    ----------
    alpha : float
        Penalty for each star: the weights w of the standardised label y minimise mean((y - x w)^2) + alpha w^2.
    transform : {"raw", "log", "asinh"}
        See `transform_flux`.
    errors_as_inputs : bool
        Regress on the logarithms of the flux errors too.
    """

    def __init__(self, alpha: float = 1e-4, transform: str = "log", errors_as_inputs: bool = False):
        self.alpha, self.transform, self.errors_as_inputs = alpha, transform, errors_as_inputs

    def fit(self, train: Spectra) -> Self:
        self.inputs = PixelInputs(train, self.transform, self.errors_as_inputs)
        x = self.inputs(train.flux, train.flux_error)[0].astype(np.float64)
        weights, offsets = [], []
        for label in train.labels.T:
            known = np.isfinite(label)
            center = x[known].mean(axis=0)
            # In units of the label's scatter, so that one alpha suits all labels.
            scale = robust_scatter(label[known]) or 1.0
            offset = label[known].mean(dtype=np.float64)
            design, target = x[known] - center, (label[known] - offset) / scale
            if len(design) < x.shape[1]:  # the same solution from a smaller matrix, (stars, stars)
                normal = design @ design.T / len(design) + self.alpha * np.eye(len(design))
                solution = design.T @ np.linalg.solve(normal, target) / len(design)
            else:
                normal = design.T @ design / len(design) + self.alpha * np.eye(x.shape[1])
                solution = np.linalg.solve(normal, design.T @ target / len(design))
            weights.append(solution * scale)
            offsets.append(offset - center @ weights[-1])
        self.weights, self.offsets = np.array(weights).T, np.array(offsets)
        return self

    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        values = self.inputs(flux, flux_error)[0] @ self.weights + self.offsets
        return values, np.ones_like(values)


class BoostingBaseline(Baseline):
    """Boosted trees on the principal components of the pixels, for each label separately (scikit-learn).

    Parameters
    ----------
    transform : {"raw", "log", "asinh"}
        See `transform_flux`.
    errors_as_inputs : bool
        Also use principal components of the logarithms of the flux errors.
    n_components : int
        Components of the pixels; a tenth as many for the errors.
    loss : {"squared_error", "absolute_error"}
    learning_rate, iterations, leaves, l2
        Of scikit-learn's `HistGradientBoostingRegressor`.
    seed : int
    """

    def __init__(
        self,
        transform: str = "asinh",
        errors_as_inputs: bool = False,
        n_components: int = 60,
        loss: str = "squared_error",
        learning_rate: float = 0.1,
        iterations: int = 300,
        leaves: int = 31,
        l2: float = 0.0,
        seed: int = 0,
    ):
        self.transform, self.errors_as_inputs, self.n_components = transform, errors_as_inputs, n_components
        self.loss, self.learning_rate, self.iterations, self.leaves = loss, learning_rate, iterations, leaves
        self.l2, self.seed = l2, seed

    def fit(self, train: Spectra) -> Self:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self.pixels = PixelInputs(train, self.transform, self.errors_as_inputs)
        x = self.pixels(train.flux, train.flux_error)[0]
        n_pixels = train.flux.shape[1]
        parts = [(slice(0, n_pixels), self.n_components)]
        if self.errors_as_inputs:
            parts.append((slice(n_pixels, None), max(1, self.n_components // 10)))
        self.components = []
        for columns, number in parts:
            variances, vectors = _principal_components(x[:, columns].astype(np.float64))
            self.components.append((columns, vectors[:, np.argsort(-variances)[:number]]))
        settings = {"loss": self.loss, "learning_rate": self.learning_rate, "max_iter": self.iterations}
        settings |= {"max_leaf_nodes": self.leaves, "l2_regularization": self.l2, "random_state": self.seed}
        inputs = self._project(x)
        self.models = []
        for label in train.labels.T:
            known = np.isfinite(label)
            # Early stopping would hold out stars that the other models are fitted to.
            model = HistGradientBoostingRegressor(early_stopping=False, **settings)
            self.models.append(model.fit(inputs[known], label[known]))
        return self

    def _project(self, x: FloatArray) -> FloatArray:
        return np.concatenate([x[:, columns] @ vectors for columns, vectors in self.components], axis=1)

    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        inputs = self._project(self.pixels(flux, flux_error)[0])
        values = np.stack([model.predict(inputs) for model in self.models], axis=1)
        return values, np.ones_like(values)


class PCAMLP(nn.Module):
    """Inputs and whitened principal components of the pixels -> hidden layers of `widths` -> (labels, 2)."""

    components: torch.Tensor

    def __init__(self, components: torch.Tensor, n_inputs: int, widths: Sequence[int], n_labels: int, dropout: float):
        super().__init__()
        self.register_buffer("components", components)  # (pixels, n_components)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([n_inputs + components.shape[1], *widths]):
            layers += [nn.Linear(n_in, n_out), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 2 * n_labels))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(stars, inputs) -> (stars, labels, 2): mean and log-variance in standardised units."""
        projected = inputs[:, : len(self.components)] @ self.components
        return self.layers(torch.cat([inputs, projected], dim=1)).unflatten(1, (-1, 2))


def _principal_components(pixels: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Variances, (components,), and components, (pixels, components): as many as there are pixels, or stars."""
    if len(pixels) >= pixels.shape[1]:
        return np.linalg.eigh(np.atleast_2d(np.cov(pixels.T)))
    # Of a few long spectra: the same from a matrix of the size of the stars.
    _, lengths, vectors = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
    return lengths**2 / (len(pixels) - 1), vectors.T


class MLPBaseline(Baseline):
    """Multilayer perceptron on pixels and principal components, with the loss of SpectraFM.

    Parameters
    ----------
    learning_rate, weight_decay, batch_size, epochs
        For AdamW, with a warm-up over the first twentieth of the steps and a cosine schedule.
    dropout : float
    noise : float
        Add Gaussian noise of this many flux errors to the pixels of each training batch.
    degrees_of_freedom : float
        As in `SpectraFMConfig`, for the loss.
    transform, errors_as_inputs
        As in `RidgeBaseline`.
    ema : float
        Decay per step of the running mean of the weights; 0 uses the last weights.
    n_components : int
        Number of principal components in addition to the pixels.
    widths : sequence of int
        Widths of the hidden layers.
    seed : int
        Seed of weights, order, dropout and noise.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        dropout: float = 0.0,
        noise: float = 0.0,
        degrees_of_freedom: float = 0.0,
        transform: str = "asinh",
        errors_as_inputs: bool = False,
        ema: float = 0.0,
        epochs: int = 45,
        batch_size: int = 256,
        n_components: int = 80,
        widths: Sequence[int] = (512, 512, 256),
        seed: int = 0,
    ):
        self.learning_rate, self.weight_decay, self.dropout, self.noise = learning_rate, weight_decay, dropout, noise
        self.degrees_of_freedom = degrees_of_freedom
        self.transform, self.errors_as_inputs, self.ema = transform, errors_as_inputs, ema
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.n_components, self.widths = n_components, tuple(widths)

    def fit(self, train: Spectra) -> Self:
        self.inputs = PixelInputs(train, self.transform, self.errors_as_inputs)
        x, sigma = (torch.from_numpy(a.astype(np.float32)) for a in self.inputs(train.flux, train.flux_error))
        n_pixels = sigma.shape[1]
        variances, vectors = _principal_components(x[:, :n_pixels].double().numpy())
        kept = np.argsort(-variances)[: self.n_components]
        # Noise-free spectra have fewer components than pixels: limit the scale of the others.
        whitened = vectors[:, kept] / np.sqrt(np.maximum(variances[kept], 1e-6 * variances.max()))

        self.labels = Standardizer(train.labels)
        known = torch.from_numpy(np.isfinite(train.labels))
        y = torch.from_numpy(np.nan_to_num((train.labels - self.labels.center) / self.labels.scale).astype(np.float32))
        label_error = torch.from_numpy(np.nan_to_num(train.label_errors / self.labels.scale).astype(np.float32))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            components = torch.from_numpy(whitened.astype(np.float32))
            network = PCAMLP(components, x.shape[1], self.widths, y.shape[1], self.dropout)
            self.network: nn.Module = network
            averaged = None
            if self.ema:
                averaged = torch.optim.swa_utils.AveragedModel(
                    network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(self.ema)
                )
            optimizer = torch.optim.AdamW(
                network.parameters(), self.learning_rate, weight_decay=self.weight_decay, fused=True
            )
            batches = -(-len(x) // self.batch_size)
            steps = self.epochs * batches
            warmup = max(1, steps // 20)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))),
            )
            for _ in tqdm(range(self.epochs), desc="PCA + MLP", unit="epoch", delay=2, leave=False, disable=None):
                for rows in torch.randperm(len(x)).split(self.batch_size):
                    batch = x[rows]
                    if self.noise:
                        batch[:, :n_pixels] += self.noise * sigma[rows] * torch.randn(len(rows), n_pixels)
                    mean, log_variance = network(batch).unbind(-1)
                    target, target_error = y[rows].masked_fill(~known[rows], math.nan), label_error[rows]
                    log_variance = log_variance.clamp(-12, 8)
                    loss = prediction_loss(mean, log_variance, target, target_error, self.degrees_of_freedom)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    if averaged is not None:
                        averaged.update_parameters(network)
        self.network = (network if averaged is None else averaged).eval()
        return self

    @torch.no_grad()
    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        x = torch.from_numpy(self.inputs(flux, flux_error)[0].astype(np.float32))
        answers = torch.cat([self.network(part) for part in x.split(4096)]).double().numpy()
        mean, log_variance = answers[..., 0], answers[..., 1]
        errors = np.exp(0.5 * np.clip(log_variance, -12, 8)) * self.labels.scale
        return mean * self.labels.scale + self.labels.center, errors


BASELINES: dict[str, type[Baseline]] = {
    "ridge": RidgeBaseline,
    "cannon": CannonBaseline,
    "boosting": BoostingBaseline,
    "mlp": MLPBaseline,
}
