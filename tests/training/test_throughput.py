"""Throughput: operations are counted exactly."""

import time

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from torch.utils._python_dispatch import _get_current_dispatch_mode

from spectrafm_hf import SpectraFMTokenizer
from spectrafm_hf.models.products_spectrafm import product
from spectrafm_hf.training.throughput import Throughput, measure_peak


def test_operations_are_those_of_forward_and_backward_and_each_batch_counts():
    layer = torch.nn.Linear(8, 16)
    throughput = Throughput()
    for stars in (5, 5, 3):
        flux = torch.randn(stars, 7, 8, requires_grad=True)
        mask = torch.ones(stars, 7, dtype=torch.bool)
        mask[0, 0] = False
        with throughput.batch({"flux": flux, "attention_mask": mask}):
            layer(flux).sum().backward()
    assert throughput.stars == 13 and throughput.tokens == 13 * 7 - 3
    # A product forward, and two backward, for the input and for the weights.
    assert throughput.operations == 3 * 2 * (13 * 7) * 8 * 16


def test_where_lengths_vary_a_few_shapes_are_counted_and_the_others_follow_from_them():
    model, tokenizer = make_tiny_model(), SpectraFMTokenizer()
    random = np.random.default_rng(0)
    few, all_of_them = Throughput(), Throughput(n_counted=99)
    counted = 0
    for n_pixels in random.permutation(np.arange(50, 250, 5)):
        inputs = tokenizer(np.arange(5000.0, 5000 + n_pixels), random.normal(1, 0.1, (8, n_pixels)))
        for throughput in (few, all_of_them):
            with throughput.batch(inputs):
                counted += _get_current_dispatch_mode() is not None
                model(**inputs).predictions.sum().backward()
    assert counted == 8 + 40
    assert few.operations == pytest.approx(all_of_them.operations, rel=0.03)


def test_attention_on_a_cpu_counts():
    throughput = Throughput()
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    with throughput.batch({"flux": query, "attention_mask": torch.ones(2, 16)}):
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    # Two products forward; four backward, and one of the first two again.
    assert throughput.operations == (2 + 5) * 2 * (2 * 3) * 16 * 16 * 8


@pytest.mark.parametrize("with_gradient", [False, True])
def test_products_by_onednn_count_as_others_do(with_gradient):
    values = torch.randn(512, 192, requires_grad=with_gradient)
    weight = torch.randn(384, 192, requires_grad=True)
    throughput = Throughput()
    with throughput.batch({"flux": values, "attention_mask": torch.ones(512, 1)}):
        product(values, weight).sum().backward()
    assert throughput.operations == (2 + with_gradient) * 2 * 512 * 192 * 384


def test_pauses_and_the_time_before_the_first_batch_are_not_counted():
    throughput = Throughput()
    time.sleep(0.2)
    with throughput.paused():
        time.sleep(0.2)
    inputs = {"flux": torch.zeros(4, 1, 1), "attention_mask": torch.ones(4, 1)}
    with throughput.batch(inputs):
        time.sleep(0.1)
    with throughput.paused():
        time.sleep(0.5)
    report = throughput.report(processes=2)
    assert 0.1 <= throughput.seconds < 0.3
    assert report["stars_per_s"] == report["tokens_per_s"] == pytest.approx(8 / throughput.seconds)


def test_the_measured_peak_is_a_rate_that_products_do_not_exceed():
    peak = measure_peak(512, 0.3)
    a = torch.randn(512, 512)
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    assert 1e8 < 10 * 2 * 512**3 / (time.perf_counter() - start) < 1.5 * peak
