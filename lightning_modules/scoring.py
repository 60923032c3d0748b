"""Other estimators on the same frozen state of a VAE: whose gradient is best here and now, and at what cost."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import stochastic_layers as sl
from lightning_modules.build import build_layer
from lightning_modules.objectives import ELBO
from lightning_modules.vae import VAE
from stochastic_layers import Sample, StochasticLayer
from stochastic_layers.diagnostics import (
    GradientStatistics,
    Reference,
    gradient_reference,
    preserved,
    sample_gradient_statistics,
)
from stochastic_layers.families import takes_categories
from stochastic_layers.layer import sum_rightmost
from stochastic_layers.redraws import MAX_BYTES
from stochastic_layers.reference import MAX_OUTCOMES

__all__ = ["LayerScore", "LayerScores", "Layers", "layer_statistics", "score_layers"]

Layers = Sequence["str | StochasticLayer"] | Mapping[str, "str | StochasticLayer | Mapping[str, Any]"]


@dataclass(frozen=True)
class LayerScore:
    """One estimator's gradient of the ELBO at the layer's params, per example, over redrawn noise.

    Attributes:
        name: The name under which the layer was given.
        layer: Its registered name.
        variance: Total variance.
        bias: Norm of the bias, its square estimated without bias; ``None`` where there is no reference.
        bias_standard_error: Standard error of that norm.
        relative_bias: Norm of the bias over that of the reference.
        snr: Norm of the expected gradient over the root of the total variance.
        cosine: Mean cosine with the reference.
        mse: Mean squared error against the reference.
        evaluations: Evaluations of the decoder for one gradient of one example.
        seconds: Wall time of one gradient of the batch at the layer's params, in a batched pass of many.
        variance_time: Variance times seconds.
        reference: ``"exact"``, ``"average"``, ``"given"`` or ``"none"``.
    """

    name: str
    layer: str
    variance: float
    bias: float | None
    bias_standard_error: float | None
    relative_bias: float | None
    snr: float
    cosine: float | None
    mse: float | None
    evaluations: int
    seconds: float
    variance_time: float
    reference: Literal["exact", "average", "given", "none"]

    @classmethod
    def of(cls, name: str, layer: StochasticLayer, statistics: GradientStatistics) -> LayerScore:
        """The record of measured statistics."""
        known = statistics.reference is not None
        bias, error = statistics.bias_norm if known else (None, None)
        return cls(
            name=name,
            layer=layer.name or type(layer).__name__,
            variance=statistics.total_variance,
            bias=bias,
            bias_standard_error=error,
            relative_bias=statistics.relative_bias[0] if known else None,
            snr=statistics.snr,
            cosine=statistics.cosine if known else None,
            mse=statistics.mse if known else None,
            evaluations=statistics.evaluations,
            seconds=statistics.seconds,
            variance_time=statistics.variance_time,
            reference=statistics.reference.kind if statistics.reference is not None else "none",
        )


@dataclass(frozen=True)
class LayerScores(Sequence[LayerScore]):
    """The records, in the order in which the layers were given, and the layers that could not be scored.

    Attributes:
        rows: One record for each layer that fits the model.
        refused: Name -> why that layer does not fit.
    """

    rows: tuple[LayerScore, ...]
    refused: Mapping[str, str]

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerScore]:
        return iter(self.rows)


def score_layers(
    model: VAE,
    x: Tensor,
    layers: Layers | None = None,
    *,
    num_draws: int = 256,
    reference: Literal["auto", "exact", "average"] | Reference | None = "auto",
    reference_draws: int = 1024,
    max_outcomes: int = MAX_OUTCOMES,
    max_bytes: int = MAX_BYTES,
) -> LayerScores:
    """Measure the gradient of other estimators on the frozen state of a VAE: same data, q, decoder, prior, objective.

    Encoder, decoder, prior and random state stay as they are; only the rule that turns draws into a gradient changes.
    What is measured is the gradient of the ELBO, with the weight that its KL has now, at the layer's params; the closed
    form of the KL, where there is one, adds no variance. All layers are held to one reference, computed once from the
    law of the model's own layer. A named layer is built afresh: its learned baseline or control variate is untrained.
    To score a trained one, pass the object.

    Args:
        model: A VAE with the objective ``"elbo"``.
        x: Data ``[B, *data_shape]``; a handful of examples is enough.
        layers: Registered names or layers; or a mapping from names of your choice to a registered name, a layer, or the
            options of one, ``{"name": ..., **options}``, where ``"name"`` may be left out if the key is registered. By
            default the model's own layer as it is, and every other registered layer of the same family. Sizes and
            family are those of the model.
        num_draws: Number of redraws for each layer, at least 2.
        reference: See :func:`~stochastic_layers.diagnostics.gradient_statistics`.
        reference_draws: See :func:`~stochastic_layers.diagnostics.gradient_statistics`.
        max_outcomes: See :func:`~stochastic_layers.diagnostics.gradient_statistics`.
        max_bytes: See :func:`~stochastic_layers.diagnostics.gradient_statistics`.

    Raises:
        ValueError: The model is no VAE with the objective ``"elbo"``, or too few redraws.

    Example:
        >>> import torch
        >>> from lightning_modules import VAE, score_layers
        >>> model = VAE("reinforce", {"latent_dim": 4, "num_samples": 2, "baseline": "leave_one_out"})
        >>> scores = score_layers(model, torch.rand(4, 1, 8, 8).round(), ["disarm", "straight_through", "gaussian"])
        >>> [(score.name, score.evaluations, score.reference) for score in scores]
        [('disarm', 2, 'exact'), ('straight_through', 1, 'exact')]
        >>> list(scores.refused)
        ['gaussian']
    """
    statistics, refused = layer_statistics(
        model,
        x,
        layers,
        num_draws=num_draws,
        reference=reference,
        reference_draws=reference_draws,
        max_outcomes=max_outcomes,
        max_bytes=max_bytes,
    )
    rows = tuple(LayerScore.of(name, layer, found) for name, (layer, found) in statistics.items())
    return LayerScores(rows, refused)


def layer_statistics(
    model: VAE,
    x: Tensor,
    layers: Layers | None = None,
    *,
    num_draws: int = 256,
    reference: Literal["auto", "exact", "average"] | Reference | None = "auto",
    reference_draws: int = 1024,
    max_outcomes: int = MAX_OUTCOMES,
    chunk_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> tuple[dict[str, tuple[StochasticLayer, GradientStatistics]], dict[str, str]]:
    """What :func:`score_layers` summarises: name -> (layer, statistics), and name -> why a layer does not fit.

    Args:
        model: See :func:`score_layers`.
        x: See :func:`score_layers`.
        layers: See :func:`score_layers`.
        num_draws: See :func:`score_layers`.
        reference: See :func:`score_layers`.
        reference_draws: See :func:`score_layers`.
        max_outcomes: See :func:`score_layers`.
        chunk_size: Largest number of redraws in one pass; by default as many as ``max_bytes`` allow.
        max_bytes: See :func:`score_layers`.

    Raises:
        ValueError: See :func:`score_layers`.
    """
    if not isinstance(model, VAE):
        raise ValueError(f"needed a VAE, whose one layer can be exchanged, got {type(model).__name__}.")
    if not isinstance(model.objective, ELBO):
        raise ValueError(
            f"needed a model with the objective 'elbo', got {model.objective.name!r}: other objectives replace the "
            "layer's estimator or have no exact gradient to compare with."
        )
    if num_draws < 2:
        raise ValueError(f"needed num_draws >= 2 to measure a variance, got {num_draws}.")
    with preserved(model, devices=[model.device]):
        state = _Frozen(model, model.objective, x)
        if reference is not None and not isinstance(reference, Reference):
            reference = gradient_reference(
                model.layer,
                state.params,
                state.cost,
                kind=reference,
                num_draws=reference_draws,
                max_outcomes=max_outcomes,
                max_bytes=max_bytes,
                known=state.known,
            )
        measured: dict[str, tuple[StochasticLayer, GradientStatistics]] = {}
        refused: dict[str, str] = {}
        for name, spec in _specs(layers, model.layer).items():
            try:
                layer = state.fitting(spec)
                statistics = sample_gradient_statistics(
                    layer,
                    state.params,
                    state.cost,
                    num_draws=num_draws,
                    reference=reference,
                    chunk_size=chunk_size,
                    max_bytes=max_bytes,
                    context=state.context(layer),
                    known=state.known,
                )
            except ValueError as error:  # its sentence says what does not fit
                refused[name] = str(error)
                continue
            measured[name] = layer, statistics
    return measured, refused


class _Frozen:
    """What does not change: data, params of q, the cost of draws, and the gradient of the terms in closed form."""

    def __init__(self, model: VAE, objective: ELBO, x: Tensor) -> None:
        self.model, self.x = model, x.to(model.device)
        with torch.no_grad():
            self.params = model.encode(self.x)
        self.weight = objective.weight(model.global_step)
        self.known: Tensor | None = None
        with torch.enable_grad():
            leaf = self.params.detach().clone().requires_grad_()
            kl = model.closed_form_kl(model.layer.distribution(leaf))
            if kl is not None:
                loss = objective.kl_term(kl, self.weight)
                # that of a point mass does not depend on its params
                self.known = torch.autograd.grad(loss.sum(), leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)

    def cost(self, sample: Sample) -> Tensor:
        """The terms of the ELBO that are estimated: ``[S, R, B]``."""
        cost = -self.model.log_likelihood(sample.z, self.x)
        if self.known is not None:
            return cost
        prior = self.model.prior(self.x.device)
        log_ratio = sample.log_prob - self.model.layer.family.log_prob(prior, sample.z)
        return cost + self.weight * sum_rightmost(log_ratio, cost.dim())

    def context(self, layer: StochasticLayer) -> Tensor | None:
        """The data, for a learned baseline that was sized for them."""
        return self.model.context(layer, self.x, self.params)

    def fitting(self, spec: str | StochasticLayer | Mapping[str, Any]) -> StochasticLayer:
        """The layer of a specification, if it draws from the same q."""
        own = self.model.layer
        layer = copy.deepcopy(spec) if isinstance(spec, StochasticLayer) else _build(spec, own)
        layer = layer.to(self.params.device).train()
        for what in ("in_features", "out_features"):
            if getattr(layer, what) != getattr(own, what):
                raise ValueError(f"needed {what}={getattr(own, what)}, as the model's, got {getattr(layer, what)}.")
        if layer.family.name != own.family.name:
            raise ValueError(f"needed family {own.family.name!r}, as the model's, got {layer.family.name!r}.")
        with torch.no_grad():
            q = own.distribution(self.params)
            z = own.family.sample(q, 4)
            log_probs = own.family.log_prob(q, z), layer.family.log_prob(layer.distribution(self.params), z)
        if not torch.allclose(*log_probs, rtol=1e-4, atol=1e-4):
            raise ValueError("needed the model's law q, got another one at the same params (see layer.distribution).")
        self.model.objective.check(layer)
        return layer


def _specs(layers: Layers | None, own: StochasticLayer) -> dict[str, str | StochasticLayer | Mapping[str, Any]]:
    if layers is None:
        return {name: own if name == own.name else name for name in sl.list_layers(family=own.family.name)}
    if isinstance(layers, str):
        raise ValueError(f"needed a list of layers, or a mapping from names to layers, got {layers!r}.")
    if isinstance(layers, Mapping):
        return {name: {"name": name, **spec} if isinstance(spec, Mapping) else spec for name, spec in layers.items()}
    named = {spec if isinstance(spec, str) else (spec.name or type(spec).__name__): spec for spec in layers}
    if len(named) != len(layers):
        raise ValueError("needed a name for each layer, got the same twice; pass a mapping from names to layers.")
    return dict(named)


def _build(spec: str | Mapping[str, Any], own: StochasticLayer) -> StochasticLayer:
    """A named layer of the model's sizes and family."""
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name"))
    options.setdefault("family", own.family.spec)
    options.setdefault("latent_dim", own.latent_dim)
    if takes_categories(own.family.name):
        options.setdefault("num_categories", own.num_categories)
    return build_layer(name, options)
