"""Adapters between a layer and the layout of the tensors around it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from stochastic_layers.layer import Sample, StochasticLayer

__all__ = ["ChannelsFirst"]


class ChannelsFirst(nn.Module):
    """A layer for convolutional features: params ``[B, in_features, *spatial]``, z ``[B, out_features, *spatial]``.

    Every position holds its own latent variables. The cost keeps one value per draw and example, ``[S, B]``.

    Args:
        layer: The layer that is applied at every position.

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.ChannelsFirst(sl.create("straight_through", latent_dim=8))
        >>> layer(torch.zeros(5, 8, 4, 4)).shape
        torch.Size([5, 8, 4, 4])
    """

    def __init__(self, layer: StochasticLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, params: Tensor) -> Tensor:
        """Draw z ``[B, out_features, *spatial]``, with a leading S for more than one point."""
        z: Tensor = self.layer(params.movedim(1, -1))
        return z.movedim(-1, 1 if z.dim() == params.dim() else 2)

    def sample(self, params: Tensor, context: Tensor | None = None) -> Sample:
        """As :meth:`StochasticLayer.sample`, with z ``[S, B, out_features, *spatial]``; context is channels-last."""
        sample = self.layer.sample(params.movedim(1, -1), context)
        return replace(sample, z=sample.z.movedim(-1, 2))
