"""Bernoulli draws of pixels: their law, their independence, and that nothing but their keys decides them."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.data.binarize import bernoulli, fixed_permutation, mix64


def test_each_pixel_is_on_with_its_probability() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    size = 40_000
    drawn = bernoulli(levels.repeat(size, 1), 255, mix64(3), torch.arange(size)).double().mean(0)
    p = levels.double() / 255
    error = (p * (1 - p) / size).sqrt()
    assert (5 * error[128:] < 0.05 * p[128:]).all()  # enough draws to see a 5 % bias of each probability above a half
    assert ((drawn - p).abs() <= 5 * error).all()  # with equality at 0 and 255: those never change


def test_float_pixels_are_drawn_like_integer_ones() -> None:
    pixels = torch.randint(0, 256, (500, 1, 9, 9), dtype=torch.uint8)  # an odd number of pixels
    one, other = (bernoulli(x, k, 7, torch.arange(500)) for x, k in ((pixels, 255), (pixels.float() / 255, 1)))
    assert (one != other).float().mean() < 1e-3  # thresholds are rounded differently in the 24th bit
    assert one.float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("shift", ["pixel", "example", "epoch", "half"])
def test_draws_of_neighbours_are_independent(shift: str) -> None:
    half = torch.full((2000, 100), 128, dtype=torch.uint8)
    x = bernoulli(half, 256, mix64(0, 0), torch.arange(2000)).double() - 0.5
    y = bernoulli(half, 256, mix64(0, 1), torch.arange(2000)).double() - 0.5
    pairs = {
        "pixel": (x[:, 1:], x[:, :-1]),
        "example": (x[1:], x[:-1]),
        "epoch": (x, y),
        "half": (x[:, :50], x[:, 50:]),
    }
    a, b = pairs[shift]
    z = 4 * (a * b).sum() / a.numel() ** 0.5  # a*b is +-1/4; a correlation of 5 % would give z > 20
    assert 0.05 * a.numel() ** 0.5 > 15
    assert z.abs() < 5


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    pixels = torch.randint(0, 256, (50, 1, 4, 5), dtype=torch.uint8)
    whole = bernoulli(pixels, 255, 11, torch.arange(50))
    some = torch.tensor([41, 3, 17])
    assert torch.equal(bernoulli(pixels[some], 255, 11, some), whole[some])


def test_mix64_depends_on_each_word_and_their_order() -> None:
    words = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**63, 0), (-1,), (0, 0, 0)]
    assert len({mix64(*w) for w in words}) == len(words)
    assert mix64(1234567) == 6457827717110365317  # the published first number of SplitMix64 seeded with this
    assert fixed_permutation(1797).sort().values.equal(torch.arange(1797))
