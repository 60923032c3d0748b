"""Parts of a model from their names: a name, a mapping ``{"name": ..., **options}``, or an object as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import Optimizer

from lightning_modules.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedLogistic,
    GaussianLikelihood,
    Likelihood,
)
from lightning_modules.multi_sample import IWAE, RWS, TVO, Renyi
from lightning_modules.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from lightning_modules.objectives import ELBO, Objective
from lightning_modules.priors import LearnedPrior, Prior, StandardPrior
from stochastic_layers import StochasticLayer, create
from stochastic_layers.families import Family, takes_categories
from stochastic_layers.registry import layer_class, list_layers, nearest

__all__ = [
    "build_decoder",
    "build_encoder",
    "build_layer",
    "build_likelihood",
    "build_objective",
    "build_optimizer",
    "build_prior",
    "default_adam",
    "optimizer_function",
]

LIKELIHOODS = {c.name: c for c in (BernoulliLikelihood, CategoricalLikelihood, DiscretizedLogistic, GaussianLikelihood)}
OBJECTIVES = {c.name: c for c in (ELBO, IWAE, Renyi, RWS, TVO)}
PRIORS = {c.name: c for c in (LearnedPrior, StandardPrior)}
ENCODERS = {"mlp": MLPEncoder, "conv": ConvEncoder}
DECODERS = {"mlp": MLPDecoder, "conv": ConvDecoder}
DEFAULT_NUM_CATEGORIES = 8

_T = TypeVar("_T")
Spec = str | Mapping[str, Any]
MakeOptimizer = Callable[[Iterable[Any]], Optimizer]


def _named(what: str, spec: Spec, classes: Mapping[str, type[_T]], *args: Any) -> _T:
    if not isinstance(spec, str | Mapping):
        raise ValueError(f"needed the name of {what}, {{'name': ..., **options}} or an object, got {spec!r}.")
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", None))
    if name not in classes:
        raise ValueError(f"needed the name of {what} or an object, got {name!r}; {nearest(name, classes)}")
    cls = classes[name]
    known = list(inspect.signature(cls).parameters)[len(args) :]
    for option in options:
        if option not in known:
            raise ValueError(f"{what} {name!r} has no option {option!r}; {nearest(option, known)}")
    return cls(*args, **options)


def layer_spec(layer: Spec, options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The name of a layer and all its options: those of a mapping ``{"name": ..., **options}`` and those beside it.

    Raises:
        ValueError: The mapping has no name, or an option is given twice with different values.
    """
    if not isinstance(layer, str | Mapping) or not isinstance(options, Mapping | None):
        raise ValueError(
            f"needed the name of a layer, {{'name': ..., **options}} or a layer, and its options as a mapping, got "
            f"{layer!r} and {options!r}."
        )
    beside, own = dict(options or {}), {"name": layer} if isinstance(layer, str) else dict(layer)
    name = own.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(
            f"needed {{'name': ..., **options}} for a layer, got {layer!r} without a name; add 'name', or write "
            f"{', '.join(f'layer_options.{option}' for option in own) or 'the name of a layer'}."
        )
    for option in sorted(beside.keys() & own.keys()):
        if beside[option] != own[option]:
            raise ValueError(
                f"needed one value of the option {option!r}, got {own[option]!r} in layer and {beside[option]!r} in "
                "layer_options; remove one."
            )
    return name, beside | own


def build_layer(layer: Spec | StochasticLayer, options: Mapping[str, Any] | None) -> StochasticLayer:
    """The layer of a registered name and its options; sizes that are not given get a default."""
    if isinstance(layer, StochasticLayer):
        if options:
            raise ValueError(
                f"needed no layer_options with a layer object, got {dict(options)}; set them on the object."
            )
        return layer
    layer, options = layer_spec(layer, options)
    if "." in layer and layer not in list_layers():
        raise ValueError(
            f"needed the name of a registered layer, got {layer!r}; on the command line a class path that exists takes "
            f"the options that its class needs after it: --model.layer={layer} --model.layer.latent_dim=N."
        )
    cls = layer_class(layer)
    parameters = inspect.signature(cls).parameters
    options.setdefault("latent_dim", cls.default_latent_dim)
    family = options.get("family", parameters["family"].default if "family" in parameters else None)
    if takes_categories(str(family.get("name") if isinstance(family, Mapping) else family)):
        options.setdefault("num_categories", DEFAULT_NUM_CATEGORIES)
    return create(layer, **options)


def build_encoder(encoder: Spec | nn.Module, data_shape: Sequence[int], out_features: int) -> nn.Module:
    """The encoder, sized for a layer."""
    if isinstance(encoder, nn.Module):
        return encoder
    return _named("an encoder", encoder, ENCODERS, data_shape, out_features)


def build_decoder(decoder: Spec | nn.Module, in_features: int, output_shape: Sequence[int]) -> nn.Module:
    """The decoder, sized for a layer and a likelihood."""
    if isinstance(decoder, nn.Module):
        return decoder
    return _named("a decoder", decoder, DECODERS, in_features, output_shape)


def build_prior(prior: Spec | Prior, family: Family) -> Prior:
    """The prior, for the layer's family."""
    return prior if isinstance(prior, Prior) else _named("a prior", prior, PRIORS, family)


def build_likelihood(likelihood: Spec | Likelihood) -> Likelihood:
    """The likelihood."""
    return likelihood if isinstance(likelihood, Likelihood) else _named("a likelihood", likelihood, LIKELIHOODS)


def build_objective(objective: Spec | Objective) -> Objective:
    """The objective."""
    return objective if isinstance(objective, Objective) else _named("an objective", objective, OBJECTIVES)


def optimizer_function(optimizer: MakeOptimizer | None) -> MakeOptimizer | None:
    """A function of parameter groups, or None for the default.

    Raises:
        ValueError: It is something else, such as an optimizer.
    """
    if not (optimizer is None or callable(optimizer)):
        raise ValueError(f"needed a function of parameter groups as optimizer, got {optimizer!r}; give a partial.")
    return optimizer


def build_optimizer(
    make: MakeOptimizer | None, groups: Sequence[dict[str, Any]], lr: float, trainer: Trainer | None
) -> Optimizer:
    """The optimizer of parameter groups that have their learning rates, which go before one of its own.

    Raises:
        ValueError: It states one of its own, and another one.
    """
    optimizer = (make or default_adam(trainer))(groups)
    stated = getattr(optimizer, "defaults", {}).get("lr", lr)
    usual = inspect.signature(type(optimizer)).parameters.get("lr")
    if stated not in (lr, None if usual is None else usual.default):
        raise ValueError(
            f"needed one learning rate, got lr = {lr:g} of the model and {stated:g} of {type(optimizer).__name__}, "
            f"which would not be used; set that of the model, lr={stated:g} (--model.lr={stated:g})."
        )
    return optimizer


def default_adam(trainer: Trainer | None) -> MakeOptimizer:
    """Adam, the default optimizer; in its fused form, unless the Trainer is to clip in mixed precision.

    There Lightning refuses to clip for a fused optimizer, which may have the scaled gradients to itself.
    """
    clips = trainer is not None and isinstance(trainer.precision_plugin, MixedPrecision) and trainer.gradient_clip_val
    return partial(torch.optim.Adam, fused=not clips)
