# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed of a training run, compared with the peak of the machine."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode


# Attention on a CPU, and matrix products by oneDNN, which torch's counter lacks.


def _attention(query, key, value, *args, **kwargs) -> int:
    """For shapes (B, heads, N, head_dim): the scores, and the weighted sum of the values."""
    return 4 * math.prod(query) * key[-2]


def _attention_backward(gradient, query, key, value, *args, **kwargs) -> int:
    """The scores again, and two products for each of the two in the forward pass."""
    return 10 * math.prod(query) * key[-2]


def _linear(values, weight, *args, **kwargs) -> int:
    return 2 * math.prod(values) * weight[0]


def _linear_backward(values, gradient, weight, output_mask, *args, **kwargs) -> int:
    """One product for the input and one for the weights, if their gradients are needed."""
    return 2 * math.prod(gradient) * weight[1] * sum(output_mask[:2])


CPU_OPERATIONS = {
    torch.ops.aten.mkldnn_linear: _linear,
    torch.ops.aten.mkldnn_linear_backward: _linear_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def number_of_stars(inputs: Mapping[str, torch.Tensor]) -> int:
    """Number of stars in a batch, for any kind of tokens."""
    return len(inputs["attention_mask"])


def measure_peak(size: int = 1024, seconds: float = 0.5) -> float:
    """
    Operations per second of float32 matrix products, in this process with its threads: the best of several.

    Parameters
    ----------
    size : int
        Rows of the square matrices; a product takes `2 * size**3` operations.
    seconds : float
        Duration of the measurement.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, size, size, device=device).unbind()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _size(shape: tuple[torch.Size, ...]) -> int:
    return sum(map(math.prod, shape))


class Throughput:
    """
    Stars, tokens and operations of a run, and its time without evaluation and saving.

    Operations of the forward and backward passes are counted with `torch.utils.flop_counter` (matrix products and
    attention; not the optimizer), once for each of the first shapes of a batch. For other shapes they are scaled from
    the counted shape of the nearest size.

    Parameters
    ----------
    n_counted : int
        Maximum number of counted shapes; counting more than doubles the time of a batch.
    """

    def __init__(self, n_counted: int = 8) -> None:
        self.n_counted = n_counted
        self.stars = 0
        self.tokens: int | torch.Tensor = 0  # on the device, as reading the number would wait for it
        self.operations = self.seconds = 0.0
        self._by_shape: dict[tuple[torch.Size, ...], float] = {}
        self._start: float | None = None

    @contextlib.contextmanager
    def batch(self, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Context of the forward and backward pass of a batch."""
        if self._start is None:
            self._start = time.perf_counter()  # the time before the first batch is excluded
        shape = tuple(tensor.shape for tensor in inputs.values())
        if shape not in self._by_shape and len(self._by_shape) < self.n_counted:
            with FlopCounterMode(display=False, custom_mapping=CPU_OPERATIONS) as counter:
                yield
            self._by_shape[shape] = float(counter.get_total_flops())
        else:
            yield
        self.stars += number_of_stars(inputs)
        self.tokens = self.tokens + inputs["attention_mask"].sum()
        nearest = min(self._by_shape, key=lambda counted: abs(_size(counted) - _size(shape)))
        self.operations += self._by_shape[nearest] * _size(shape) / _size(nearest)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context of work that is not timed."""
        running = self._start is not None
        self.stop()
        yield
        self._start = time.perf_counter() if running else None

    def stop(self) -> None:
        if self._start is not None:
            self.seconds += time.perf_counter() - self._start
            self._start = None

    def report(self, processes: int = 1) -> dict[str, float]:
        """
        Speed of the run, for `processes` with equal work: `stars_per_s`, `tokens_per_s`, `gflop_per_s`, and
        `share_of_peak`, relative to the matrix products of [`measure_peak`].
        """
        self.stop()
        seconds = max(self.seconds, 1e-9)
        return {
            "stars_per_s": processes * self.stars / seconds,
            "tokens_per_s": processes * float(self.tokens) / seconds,
            "gflop_per_s": processes * self.operations / seconds / 1e9,
            "share_of_peak": self.operations / seconds / measure_peak(),
        }
