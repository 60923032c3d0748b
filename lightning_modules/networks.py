"""Default encoders and decoders for images: a multilayer perceptron and a convolutional net of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

__all__ = ["ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder", "one_tensor"]


def _mlp(sizes: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.LeakyReLU(0.1)]
    return layers[:-1]


class MLPEncoder(nn.Sequential):
    """``[N, *data_shape]`` -> ``[N, out_features]``.

    Args:
        data_shape: Shape of one example.
        out_features: Size of the output: ``layer.in_features``.
        hidden_features: Widths of the hidden layers.
    """

    def __init__(
        self, data_shape: Sequence[int], out_features: int, hidden_features: Sequence[int] = (512, 256)
    ) -> None:
        super().__init__(nn.Flatten(), *_mlp([math.prod(data_shape), *hidden_features, out_features]))


class MLPDecoder(nn.Sequential):
    """``[N, in_features]`` -> ``[N, *data_shape]``.

    Args:
        in_features: Size of the input: ``layer.out_features``.
        data_shape: Shape of the output; its first dimension holds ``outputs_per_value`` values per channel.
        hidden_features: Widths of the hidden layers.
    """

    def __init__(
        self, in_features: int, data_shape: Sequence[int], hidden_features: Sequence[int] = (256, 512)
    ) -> None:
        super().__init__(
            *_mlp([in_features, *hidden_features, math.prod(data_shape)]), nn.Unflatten(1, tuple(data_shape))
        )


class ConvEncoder(nn.Module):
    """A strided convolutional net, ``[N, C, H, W]`` -> ``[N, out_features]``; each stage halves height and width.

    Args:
        data_shape: ``(C, H, W)``, with H and W at least 4.
        out_features: Size of the output: ``layer.in_features``.
        hidden_features: Channels of the stages.
    """

    def __init__(self, data_shape: Sequence[int], out_features: int, hidden_features: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels, height, width = _image_shape(data_shape)
        for hidden in hidden_features:
            stages += [nn.Conv2d(channels, hidden, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
            channels, height, width = hidden, math.ceil(height / 2), math.ceil(width / 2)
        self.stages = nn.Sequential(*stages, nn.Flatten())
        self.head = nn.Linear(channels * height * width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.stages(x))
        return result


class ConvDecoder(nn.Module):
    """The mirror image of :class:`ConvEncoder`, ``[N, in_features]`` -> ``[N, C, H, W]``.

    Args:
        in_features: Size of the input: ``layer.out_features``.
        data_shape: ``(C, H, W)`` of the output.
        hidden_features: Channels of the stages, from the latent to the image.
    """

    def __init__(self, in_features: int, data_shape: Sequence[int], hidden_features: Sequence[int] = (64, 32)) -> None:
        super().__init__()
        out_channels, height, width = _image_shape(data_shape)
        sizes = [(height, width)]  # from the image inwards
        for _ in hidden_features:
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
        self.start = (hidden_features[0], *sizes[-1])
        self.head = nn.Sequential(nn.Linear(in_features, math.prod(self.start)), nn.LeakyReLU(0.1))
        stages: list[nn.Module] = []
        channels = [*hidden_features, out_channels]
        for i, (h, w) in enumerate(reversed(sizes[:-1])):
            below = sizes[len(sizes) - 1 - i]
            padding = (1 if h == 2 * below[0] else 0, 1 if w == 2 * below[1] else 0)  # an odd size needs one row less
            stages.append(nn.ConvTranspose2d(channels[i], channels[i + 1], 3, 2, 1, output_padding=padding))
            stages.append(nn.LeakyReLU(0.1))
        self.stages = nn.Sequential(*stages[:-1])

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.stages(self.head(z).unflatten(1, self.start))
        return result


def one_tensor(output: Any, what: str) -> Tensor:
    """The output of an encoder or a decoder, which is one tensor.

    Raises:
        ValueError: It is something else, such as a pair of loc and log-variance.
    """
    if not isinstance(output, Tensor):
        raise ValueError(
            f"needed {what} whose output is one tensor, got a {type(output).__name__}; join its parts along dimension "
            "1, torch.cat((loc, log_variance), 1) for a Gaussian."
        )
    return output


def _image_shape(data_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(data_shape) != 3:
        raise ValueError(
            f"needed data_shape (channels, height, width) for a convolutional net, got {tuple(data_shape)}."
        )
    channels, height, width = data_shape
    return channels, height, width
