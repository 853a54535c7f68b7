"""Principal components of the pixels of labelled stars."""

import numpy as np
import torch

from spectrafm_hf.models.correction_spectrafm import PIXEL_SOFTENING
from spectrafm_hf.training.components import NOISE_STARS, OWN_SHARE, fit_pixels


N_PIXELS, CLEAN, NOISY = 60, 0.1, 1.0  # noise of the pixels, in units of what the stars differ by


def draw_stars(number, seed=0):
    """What stars differ by (stars, 2), and their pixels; every second pixel has ten times the noise of the others."""
    generator = np.random.default_rng(seed)
    differ = generator.standard_normal((number, 2))
    waves = np.stack([np.sin(0.1 * np.arange(N_PIXELS)), np.cos(0.1 * np.arange(N_PIXELS))])
    noise = np.where(np.arange(N_PIXELS) % 2, NOISY, CLEAN)
    asinh = 2.0 + 0.05 * (differ @ waves + noise * generator.standard_normal((number, N_PIXELS)))
    return differ, PIXEL_SOFTENING * np.sinh(asinh)


def test_pixels_with_less_noise_count_more_in_the_scaled_components():
    _, pixels = draw_stars(2_000)
    module = fit_pixels(pixels)
    # Of a pixel with variance 1 + noise^2, scaled to 1, noise^2 / (1 + noise^2) is noise. So have the components some.
    expected = [(OWN_SHARE + noise**2 / (1.0 + noise**2)) ** -0.5 for noise in (CLEAN, NOISY)]
    weight = module.scaled_directions.norm(dim=1)  # of all components
    ratio = float(weight[::2].mean() / weight[1::2].mean()) / (expected[0] / expected[1])
    assert 0.6 < ratio < 1.0
    torch.testing.assert_close(module.directions.T @ module.directions, torch.eye(N_PIXELS).double())


def test_few_stars_do_not_show_the_noise():
    module = fit_pixels(draw_stars(NOISE_STARS - 1)[1])
    found = module.scaled_directions[:, :20]
    torch.testing.assert_close(found.T @ found, torch.eye(20).double())


def test_the_first_scaled_components_see_through_the_noise():
    number = NOISE_STARS
    differ, pixels = draw_stars(number)
    module = fit_pixels(pixels)
    others, other_pixels = draw_stars(500, seed=1)
    scatter = {}
    for name in ("pixels", "scaled"):
        learnt, found = (module(torch.from_numpy(flux))[name][:, :2].numpy() for flux in (pixels, other_pixels))
        design = np.column_stack([learnt, np.ones(number)])
        slopes = np.linalg.lstsq(design, differ, rcond=None)[0]
        scatter[name] = np.std(np.column_stack([found, np.ones(500)]) @ slopes - others)
    assert scatter["scaled"] < 0.5 * scatter["pixels"]


def test_stars_that_are_all_alike_have_components_of_zero():
    module = fit_pixels(np.ones((20, N_PIXELS)))
    found = module(torch.full((3, N_PIXELS), 1.1, dtype=torch.float64))
    assert all(bool(part.isfinite().all()) for part in found.values())
