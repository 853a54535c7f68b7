# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Matrix products in single precision on a CPU, by the fastest library there.

PyTorch uses MKL for float32, which uses half of the vector units of AMD processors. oneDNN, which PyTorch includes for
half precision, uses all of them: large products take half the time on an AMD EPYC of the fifth generation (230 against
105 GFLOP/s with one thread). On Intel processors MKL is faster, by a third on a Xeon of the fifth generation (150
against 115), and is kept.
"""

import functools
import platform
from pathlib import Path

import torch


#: Operations of a product below which the conversion for oneDNN costs more than it saves.
LEAST_OPERATIONS = 8e6
LEAST_ROWS = 160


def product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `left @ right.T + bias`, of (N, K), (M, K) and (M,) -> (N, M).

    Differentiable. Products that are small, traced for an export, not on a CPU, or not in single precision are computed
    by PyTorch as usual.
    """
    if _suits(left, right):
        # A product of a tensor in the layout of oneDNN is done by it.
        return torch.nn.functional.linear(left.to_mkldnn(), right, bias).to_dense()
    return torch.nn.functional.linear(left, right, bias)


def products(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`left @ right + bias` of each of some members: (members, N, K), (members, K, M), (members, 1, M)."""
    # oneDNN first transposes each matrix, which pays only for many rows.
    # The number of rows comes last: an export must not fix it.
    if right.dtype == torch.float32 and _suits(left[0], right[0].mT) and left.shape[1] >= LEAST_ROWS:
        biases = [None] * len(right) if bias is None else bias[:, 0].unbind()
        return torch.stack([product(*each) for each in zip(left, right.mT, biases, strict=True)])
    return left @ right if bias is None else torch.baddbmm(bias, left, right)


@functools.cache
def is_intel() -> bool:
    """Whether the processor is one of Intel; not known on systems other than Linux and Windows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = platform.processor()
    return "GenuineIntel" in text


def _suits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    if is_intel() or torch.is_autocast_enabled("cpu"):
        return False
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (left, right))
    large = 2.0 * left.shape[0] * left.shape[1] * right.shape[0] >= LEAST_OPERATIONS
    return plain and large and bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


#: Largest matrix for LAPACK; larger ones are divided.
SMALL = 16


def inverse_factor(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Inverses of the lower Cholesky factors of matrices (stars, K, K), so that their inverse is `factor^T factor`; and
    whether that failed, (stars,). Computed recursively by halves, because LAPACK is slow for small matrices.
    """
    size = matrix.shape[-1]
    if size <= SMALL:
        lower, info = torch.linalg.cholesky_ex(matrix)
        unit = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(lower, unit, upper=False), info > 0
    half = size // 2
    upper, failed = inverse_factor(matrix[:, :half, :half])
    below = matrix[:, half:, :half] @ upper.mT
    lower, failed_too = inverse_factor(matrix[:, half:, half:] - below @ below.mT)
    found = torch.empty_like(matrix)
    found[:, :half, :half], found[:, half:, half:] = upper, lower
    found[:, :half, half:] = 0.0
    found[:, half:, :half] = -lower @ (below @ upper)
    return found, failed | failed_too


__all__ = ["inverse_factor", "product", "products"]
