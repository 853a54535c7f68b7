# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""How fast a training run is, and how fast the machine could be."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode


# Attention on a CPU, and matrix products by oneDNN, of which the counter does not know.


def _attention(query, key, value, *args, **kwargs) -> int:
    """Of the shapes (B, heads, N, head_dim): scores, and the sum that they weight."""
    return 4 * math.prod(query) * key[-2]


def _attention_backward(gradient, query, key, value, *args, **kwargs) -> int:
    """Scores again, and two products for each of the two forward."""
    return 10 * math.prod(query) * key[-2]


def _linear(values, weight, *args, **kwargs) -> int:
    return 2 * math.prod(values) * weight[0]


def _linear_backward(values, gradient, weight, output_mask, *args, **kwargs) -> int:
    """A product for the input and one for the weights, where they are wanted."""
    return 2 * math.prod(gradient) * weight[1] * sum(output_mask[:2])


CPU_OPERATIONS = {
    torch.ops.aten.mkldnn_linear: _linear,
    torch.ops.aten.mkldnn_linear_backward: _linear_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def number_of_stars(inputs: Mapping[str, torch.Tensor]) -> int:
    """Of a batch, whatever its tokens are."""
    return len(inputs["attention_mask"])


def measure_peak(size: int = 1024, seconds: float = 0.5) -> float:
    """
    Operations a second of float32 matrix products, in this process and with its threads: the best of several.

    Parameters
    ----------
    size : int
        Of the square matrices; a product takes `2 * size**3` operations.
    seconds : float
        To spend on it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, size, size, device=device).unbind()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # which waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _size(shape: tuple[torch.Size, ...]) -> int:
    return sum(map(math.prod, shape))


class Throughput:
    """
    Stars, tokens and operations of a run, and the time of it that is neither evaluation nor saving.

    Operations are those of the forward and backward passes as `torch.utils.flop_counter` counts them (matrix products
    and attention; not the optimizer), counted once for each of the first shapes of a batch. Of another shape they are
    taken to be those of the counted one of the nearest size, in proportion to it.

    Parameters
    ----------
    n_counted : int
        Shapes that are counted, each of which takes a batch more than twice the time.
    """

    def __init__(self, n_counted: int = 8) -> None:
        self.n_counted = n_counted
        self.stars = 0
        self.tokens: int | torch.Tensor = 0  # on the device: to ask for the number would wait for it
        self.operations = self.seconds = 0.0
        self._by_shape: dict[tuple[torch.Size, ...], float] = {}
        self._start: float | None = None

    @contextlib.contextmanager
    def batch(self, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Around the forward and backward pass of a batch."""
        if self._start is None:
            self._start = time.perf_counter()  # what comes before the first batch does not count
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
        """Around what does not count."""
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
        Of the whole run, in which each of `processes` does as much: `stars_per_s`, `tokens_per_s`, `gflop_per_s`, and
        `share_of_peak`, which is that of the matrix products of [`measure_peak`].
        """
        self.stop()
        seconds = max(self.seconds, 1e-9)
        return {
            "stars_per_s": processes * self.stars / seconds,
            "tokens_per_s": processes * float(self.tokens) / seconds,
            "gflop_per_s": processes * self.operations / seconds / 1e9,
            "share_of_peak": self.operations / seconds / measure_peak(),
        }
