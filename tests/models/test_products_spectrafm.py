# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Products by oneDNN agree with those of torch, with the same derivatives."""

import pytest
import torch

from spectrafm_hf.models import products_spectrafm
from spectrafm_hf.models.products_spectrafm import product, products


@pytest.fixture(autouse=True)
def by_the_other_library(monkeypatch):
    """As on a processor that is not of Intel."""
    monkeypatch.setattr(products_spectrafm, "is_intel", lambda: False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_large_product_is_that_of_torch_with_its_derivatives(with_bias):
    left, right, bias = random(300, 150), random(200, 150), random(200) if with_bias else None
    inputs = [tensor for tensor in (left, right, bias) if tensor is not None]
    assert products_spectrafm._suits(left, right)
    found, expected = product(left, right, bias), left @ right.T + (0.0 if bias is None else bias)
    assert torch.allclose(found, expected, atol=1e-4)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("n_rows", [1, products_spectrafm.LEAST_ROWS - 1, 300])
def test_products_of_members_are_those_of_each(n_rows):
    left, right, bias = random(3, n_rows, 150), random(3, 150, 200), random(3, 1, 200)
    assert torch.allclose(products(left, right, bias), left @ right + bias, atol=1e-4)
    assert torch.allclose(products(left.expand(3, -1, -1), right), left @ right, atol=1e-4)


def test_other_precisions_use_torch():
    left, right = random(300, 150).detach(), random(200, 150).detach()
    assert product(left.double(), right.double()).equal(left.double() @ right.double().T)
    assert not products_spectrafm._suits(left.bfloat16(), right.bfloat16())
    assert not products_spectrafm._suits(left[:1], right)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(left, right).dtype == torch.bfloat16


def test_on_intel_processors_mkl_is_used(monkeypatch):
    left, right = random(300, 150).detach(), random(200, 150).detach()
    assert products_spectrafm._suits(left, right)
    monkeypatch.setattr(products_spectrafm, "is_intel", lambda: True)
    assert not products_spectrafm._suits(left, right)
    assert torch.allclose(product(left, right), left @ right.T, atol=1e-4)
