"""Channels-first features: the same draws and gradients as with the channels moved last by hand."""

import pytest
import torch

import stochastic_layers as sl


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("spatial", [(4,), (4, 5)])
def test_channels_first_is_the_layer_with_its_channels_moved(num_samples, spatial):
    layer = sl.create("reinforce", latent_dim=6, num_samples=num_samples, baseline="none")
    first = torch.randn(2, 6, *spatial, requires_grad=True)
    last = first.detach().movedim(1, -1).clone().requires_grad_()
    weight = torch.randn(6, *spatial)

    torch.manual_seed(0)
    sample = sl.ChannelsFirst(layer).sample(first)
    assert sample.z.shape == (num_samples, 2, 6, *spatial)
    loss = sample.surrogate((sample.z * weight).flatten(2).sum(-1) ** 2)  # [S, B]: positions are summed
    loss.sum().backward()

    torch.manual_seed(0)
    expected = layer.sample(last)
    expected.surrogate((expected.z * weight.movedim(0, -1)).flatten(2).sum(-1) ** 2).sum().backward()
    assert loss.shape == (2,)
    torch.testing.assert_close(first.grad.movedim(1, -1), last.grad)


def test_channels_first_forwards_under_capture_and_in_eval():
    module = sl.ChannelsFirst(sl.create("disarm", latent_dim=3))
    params = torch.zeros(2, 3, 4, 4, requires_grad=True)
    with sl.capture() as samples:
        z = module(params)
    assert z.shape == (2, 2, 3, 4, 4)
    sl.surrogate(z.flatten(2).sum(-1) ** 2, samples).mean().backward()
    assert params.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"outside sl\.capture"):
        module(params)
    assert module.eval()(params).shape[-3:] == (3, 4, 4)


def test_images_given_to_a_bare_layer_are_referred_to_the_adapter():
    with pytest.raises(ValueError, match=r"got \[5, 8, 4, 4\]; wrap the layer in sl.ChannelsFirst"):
        sl.create("straight_through", latent_dim=8)(torch.zeros(5, 8, 4, 4))
