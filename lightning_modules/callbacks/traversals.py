"""What single latent units do to the reconstruction, and walks between two examples, for latents of any family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.base import LatentVariableModel

__all__ = ["Traversal", "interpolations", "traversal"]

DRAWS = 1024  # draws of q, all examples together, from which the range of a continuous unit is taken


@dataclass(frozen=True)
class Traversal:
    """Reconstructions with one latent unit changed.

    Attributes:
        images: ``[units, examples, values, *data_shape]``; NaN where a unit has fewer values than others.
        units: The number of each unit.
        values: Each value, in words.
    """

    images: Tensor
    units: list[int]
    values: list[str]


@torch.no_grad()
def traversal(model: LatentVariableModel[object], x: Tensor, columns: int = 10, rows: int = 10) -> Traversal:
    """Set the most active units of the first layer to each of their values, one unit at a time.

    The values of a bit are 0 and 1; of a one-hot vector, its categories; of a vector on the simplex, the corners; of
    another discrete unit, the most frequent ones at the data (codes, subsets, orders, counts); of a continuous unit,
    quantiles from 2 to 98 % of draws of q at the data, which are those of the prior where the unit is inactive. Where a
    unit has few values, further examples stand beside the first. Latents at positions are set at all positions at once.

    Args:
        model: The model, in evaluation mode.
        x: Data ``[B, *data_shape]``; the first ones are shown, all give the range and the order of the units.
        columns: Number of columns, about.
        rows: Number of units, at most.

    Raises:
        ValueError: The coordinates of the family are not free.
    """
    layer = model.stochastic_layers[0]
    family = layer.family
    if family.name == "power_spherical":
        raise ValueError("needed latents with free coordinates for a traversal, got points of a sphere.")
    q = layer.distribution(model.encode(x))
    size = layer.out_features // layer.latent_dim
    base = _units(family.mode(q), size)  # [B, *positions, latent_dim, size]
    draws = _units(family.sample(q, -(-DRAWS // len(x))), size)
    activity = base.double().var(0, correction=0).sum(-1).reshape(-1, layer.latent_dim).sum(0)
    units = sorted(activity.topk(min(rows, layer.latent_dim)).indices.tolist())
    if family.name == "bernoulli":
        every, names = torch.eye(2)[1:].t().expand(len(units), 2, 1), ["0", "1"]
    elif size > 1 and (family.name == "categorical" or not family.discrete):
        every, names = torch.eye(size).expand(len(units), size, size), [str(i) for i in range(size)]
    elif family.discrete:
        every = _most_frequent([draws[..., unit, :].reshape(-1, size) for unit in units], columns)
        names = [str(i + 1) for i in range(every.shape[1])]
    else:
        levels = torch.linspace(0.02, 0.98, columns)
        flat = draws.flatten(0, -3).squeeze(-1)[:, units].float()
        every = torch.quantile(flat.cpu(), levels, dim=0).t().unsqueeze(-1)
        names = [f"{level:.0%}" for level in levels.tolist()]
    every = every.to(base)  # [rows, values, size]
    shown = base[: max(1, columns // every.shape[1])]
    pictures = []
    for unit, values in zip(units, every, strict=True):
        z = shown.unsqueeze(1).repeat_interleave(len(values), 1)  # [examples, values, *positions, latent_dim, size]
        z[..., unit, :] = values.view(1, -1, *[1] * (z.dim() - 4), size)
        missing = z.flatten(2).isnan().any(-1)
        images = model.likelihood.mean(model.decode(z.nan_to_num().flatten(-2)))
        images[missing] = float("nan")
        pictures.append(images)
    return Traversal(torch.stack(pictures), units, names)


@torch.no_grad()
def interpolations(model: LatentVariableModel[object], x: Tensor, columns: int = 10) -> Tensor:
    """Walk from the code of one example to that of the next: reconstructions ``[pairs, columns, *data_shape]``.

    Continuous latents move on a straight line (of a sphere, on its great circle). Discrete ones do not lie between each
    other: the units in which the two codes differ are switched one after another.

    Args:
        model: The model, in evaluation mode.
        x: Data ``[2 * pairs, *data_shape]``; neighbours are paired.
        columns: Number of steps, both ends included.
    """
    layer = model.stochastic_layers[0]
    z = layer.mode(model.encode(x))
    start, end = z[0 : len(z) - 1 : 2].unsqueeze(1), z[1::2].unsqueeze(1)  # [pairs, 1, *positions, out_features]
    t = torch.linspace(0, 1, columns, device=z.device, dtype=z.dtype).view(-1, *[1] * (z.dim() - 1))
    if layer.family.discrete:
        size = layer.out_features // layer.latent_dim
        one, two = _units(start, size), _units(end, size)
        differs = (one != two).any(-1).flatten(2)  # [pairs, 1, units]
        order = differs.cumsum(-1) * differs  # 1, 2, ... for the units that differ, in turn
        done = (t.view(1, -1, 1) * differs.sum(-1, keepdim=True)).round()  # [pairs, columns, 1]
        switched = (order <= done).view(len(one), columns, *one.shape[2:-1], 1)
        path = torch.where(switched, two, one).flatten(-2)
    else:
        path = torch.lerp(start, end, t)
        if layer.family.name == "power_spherical":
            path = torch.nn.functional.normalize(path, dim=-1)
    return model.likelihood.mean(model.decode(path))


def _units(z: Tensor, size: int) -> Tensor:
    """``[..., out_features]`` -> ``[..., latent_dim, size]``."""
    return z.reshape(*z.shape[:-1], -1, size)


def _most_frequent(rows: list[Tensor], count: int) -> Tensor:
    """The most frequent values ``[U, V, size]`` of each of U units ``[N, size]``; NaN where a unit has fewer than V."""
    chosen = []
    for values in rows:
        distinct, counts = values.unique(dim=0, return_counts=True)  # type: ignore[no-untyped-call]
        best = counts.topk(min(count, len(counts))).indices.sort().values  # in the order of the values
        chosen.append(distinct[best])
    most = max(len(values) for values in chosen)
    result = rows[0].new_full((len(rows), most, rows[0].shape[-1]), float("nan"))
    for row, values in zip(result, chosen, strict=True):
        row[: len(values)] = values
    return result
