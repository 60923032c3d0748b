"""What a latent-variable model measures in validation and testing, exactly on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils.data import DistributedSampler
from torchmetrics import Metric

from lightning_modules.metrics import (
    ActiveUnits,
    CodePerplexity,
    EvidenceLowerBound,
    ExampleMean,
    ImportanceWeightedBound,
    KLPerDimension,
)
from stochastic_layers import StochasticLayer
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.quantized import QuantizedLayer
from stochastic_layers.subsets import SubsetFamily

__all__ = ["Evaluation", "evaluation_loader", "evaluations", "unpadded"]

MAX_CODES = 2**16  # a histogram over more codes than this is not kept


class Evaluation(nn.Module):
    """The metrics of one stage.

    Attributes:
        elbo: The ELBO, beta = 1.
        kl: Its KL.
        reconstruction: Its reconstruction term.
        iwae: The importance-weighted bound, where asked for.
        active_units: Units of the first layer whose posterior mean varies over the data. Where q has no mean in closed
            form (``flow``, ``hard_concrete``, ``invertible_gaussian``), its mode stands for it, and for that of an
            order the expected places of the items (:meth:`~stochastic_layers.families.Family.center`).
        kl_per_dimension: KL of each latent variable, where it is known in closed form.
        perplexity: Use of categories, items of subsets or codes, where there are any and not more than ``MAX_CODES``.
            Positions share their categories; latents of a quantiser share a codebook.

    Args:
        layer: The first stochastic layer.
        positions: Shape of the positions at which there are latents.
        num_kl_terms: Number of columns of the KL, None where it is not known per latent variable.
        iwae: Whether the importance-weighted bound is measured.
    """

    def __init__(
        self, layer: StochasticLayer, positions: tuple[int, ...], num_kl_terms: int | None, iwae: bool
    ) -> None:
        super().__init__()
        self.elbo, self.kl, self.reconstruction = EvidenceLowerBound(), ExampleMean(), ExampleMean()
        self.iwae = ImportanceWeightedBound() if iwae else None
        places = math.prod(positions)
        center = layer.family.center(layer.distribution(torch.zeros(layer.in_features)))
        self.active_units = ActiveUnits(places * layer.latent_dim, center.numel() // layer.latent_dim)
        self.kl_per_dimension = None if num_kl_terms is None else KLPerDimension(num_kl_terms)
        self.perplexity: CodePerplexity | None = None
        if isinstance(layer, QuantizedLayer) and layer.num_codes <= MAX_CODES:
            self.perplexity = CodePerplexity(layer.num_codes, math.prod(layer.codes.index_shape))
        elif isinstance(layer.family, (CategoricalFamily, SubsetFamily)) and layer.num_categories is not None:
            self.perplexity = CodePerplexity(layer.num_categories, layer.latent_dim)
        self._layer = (layer,)  # in a tuple, so that the layer does not become a part of this module

    def update(
        self, bound: Mapping[str, Tensor], kl: Tensor | None, q: Distribution, params: Tensor, count: int | None
    ) -> None:
        """Add the first ``count`` examples of a batch; the others are the padding of a sampler.

        Args:
            bound: ``kl`` and ``reconstruction``, ``[B]``.
            kl: KL of each latent variable ``[B, L]``, where known.
            q: The law of the first layer, with batch shape ``[B, *positions]``.
            params: Its params ``[B, *positions, in_features]``.
            count: Number of examples that count; all by default.
        """
        (layer,) = self._layer
        reconstruction, total_kl = bound["reconstruction"][:count], bound["kl"][:count]
        self.elbo.update(reconstruction, total_kl)
        self.kl.update(total_kl)
        self.reconstruction.update(reconstruction)
        center = layer.family.center(q)
        self.active_units.update(center[:count])
        if self.kl_per_dimension is not None and kl is not None:
            self.kl_per_dimension.update(kl[:count])
        if self.perplexity is not None:
            codes = layer.indices(params) if isinstance(layer, QuantizedLayer) else center
            if isinstance(layer, QuantizedLayer) and not layer.codes.index_shape:
                codes = codes.unsqueeze(-1)
            self.perplexity.update(codes[:count])

    def scalars(self) -> dict[str, Metric]:
        """The metrics that are one number, by the names under which they are logged."""
        metrics: dict[str, Metric | None] = {
            "elbo": self.elbo,
            "kl": self.kl,
            "reconstruction": self.reconstruction,
            "iwae": self.iwae,
            "active_units": self.active_units,
            "perplexity": self.perplexity,
        }
        return {name: metric for name, metric in metrics.items() if metric is not None}

    def reset(self) -> None:
        """Forget all examples."""
        for metric in self.children():
            if isinstance(metric, Metric):
                metric.reset()


def evaluations(
    layer: StochasticLayer,
    positions: tuple[int, ...],
    num_kl_terms: int | None,
    iwae_samples: Mapping[str, int],
) -> nn.ModuleDict:
    """:class:`Evaluation` of the stages ``"val"`` and ``"test"``."""
    return nn.ModuleDict(
        {stage: Evaluation(layer, positions, num_kl_terms, bool(iwae_samples.get(stage))) for stage in ("val", "test")}
    )


def evaluation_loader(trainer: Trainer) -> Any:
    """The data loader of the validation or testing that is going on; None where there are several.

    Not ``trainer.val_dataloaders``, which may hold it in a list, and which after a fit is that of the fit for ever.
    """
    combined = trainer._evaluation_loop._combined_loader
    return combined.flattened[0] if combined is not None and len(combined.flattened) == 1 else None


def unpadded(loader: Any, batch_idx: int) -> int | None:
    """Number of examples at the start of a batch that are no padding; None for all of them.

    ``DistributedSampler``, which a Trainer puts into the data loaders of a run on several processes, repeats examples
    until all ranks have the same number. They come last: example i of rank r is number ``r + i * world_size``, and
    those from ``len(dataset)`` on are repeats.

    Args:
        loader: The data loader of the evaluation.
        batch_idx: Number of the batch.
    """
    sampler, batch_size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or not isinstance(batch_size, int):
        return None
    size: int = len(sampler.dataset)  # type: ignore[arg-type]
    own = len(range(sampler.rank, size, sampler.num_replicas))
    return max(0, own - batch_idx * batch_size)
