"""A hierarchy of stochastic layers: bottom-up inference, top-down generation, any estimator at every level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer

from lightning_modules.base import LatentVariableModel
from lightning_modules.build import build_decoder, build_encoder, build_layer, build_prior
from lightning_modules.evaluation import evaluations
from lightning_modules.likelihoods import Likelihood
from lightning_modules.networks import MLPDecoder, MLPEncoder, one_tensor
from lightning_modules.objectives import ELBO, Objective
from lightning_modules.priors import Prior, kl_is_known, kl_per_latent
from stochastic_layers import Sample, StochasticLayer
from stochastic_layers.diagnostics import preserved

__all__ = ["HierarchicalTerms", "HierarchicalVAE"]


@dataclass(frozen=True)
class HierarchicalTerms:
    """One batch through a hierarchy of L layers; layer l has draws ``[S_l, S_{l-1}, ..., S_1, B]``.

    Attributes:
        params: Params of each layer, ``[S_{l-1}, ..., S_1, B, in_features]``.
        samples: The sample of each layer.
        log_likelihood: log p(x | z_1) ``[S_1, B]``.
        log_ratios: For each layer but the last log q(z_l) ``[S_l, ..., B]``, whose log p is known one level higher; for
            the last log q - log p, or ``None`` where the KL is analytic.
        log_priors: log p(z_l | z_{l+1}) ``[S_{l+1}, ..., B]`` for each layer but the last.
        kl: Closed-form KL of the last layer ``[S_{L-1}, ..., B]``, ``None`` where there is none.
    """

    params: tuple[Tensor, ...]
    samples: tuple[Sample, ...]
    log_likelihood: Tensor
    log_ratios: tuple[Tensor | None, ...]
    log_priors: tuple[Tensor, ...]
    kl: Tensor | None

    def fold(self, likelihood_weight: float, kl_weight: float) -> Tensor:
        """The loss of - likelihood_weight * log p(x | z_1) + kl_weight * (all the rest) ``[B]``, by nested surrogates.

        Every term is added at the level at which it is known, so that a layer is credited with what it caused only.
        """
        last = len(self.samples) - 1
        loss: Tensor | None = None
        for level in range(last, -1, -1):
            cost = -likelihood_weight * self.log_likelihood if level == 0 else -kl_weight * self.log_priors[level - 1]
            log_ratio = self.log_ratios[level]
            if log_ratio is not None:
                cost = cost + kl_weight * log_ratio
            if loss is not None:
                cost = cost + loss
            loss = self.samples[level].surrogate(cost)
            if level == last and self.kl is not None:
                loss = loss + kl_weight * self.kl
        assert loss is not None
        return loss


class HierarchicalVAE(LatentVariableModel[HierarchicalTerms]):
    r"""A VAE with several stochastic layers, discrete or continuous, each with its own estimator.

    .. math:: q(z_1 \mid x) \prod_{l=2}^L q(z_l \mid z_{l-1}), \qquad
        p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1}) \; p(x \mid z_1)

    With Bernoulli layers and linear transitions (the default) it is a sigmoid belief network. The loss is one scalar:
    the surrogate of layer l, whose cost is the sum of the terms that z_l determines, is part of the cost of layer
    l - 1, so that the gradient of every layer is estimated by its own rule from what it caused. The estimate is
    unbiased where all layers are; a layer with several draws multiplies the work of those above it.

    The KL of the last layer, given the one below, is taken in closed form where there is one. The KL of the others is
    not: :math:`z_{l+1}` is drawn from :math:`z_l`, so that :math:`KL(q(z_l \mid z_{l-1}) \| p(z_l \mid z_{l+1}))` at
    fixed :math:`z_{l+1}` has another expectation than :math:`\log q(z_l) - \log p(z_l \mid z_{l+1})`, which is
    estimated on the draws.

    Logs the keys of :class:`VAE`; ``train/grad_variance`` is the sum over the layers, ``train/grad_variance/<l>`` (from
    1, at the data) that of one layer, and likewise ``train/grad_snr``. For l > 1 it includes the variation of the draws
    below, from which its params are computed.

    Args:
        layers: From the data upwards: names of layers, mappings ``{"name": ..., **options}``, or layers. A quantizer
            can only be the last one, with ``prior="standard"``: those below, and a learned prior, need a density.
        encoder: See :class:`VAE`; from the data to the first layer.
        decoder: See :class:`VAE`; from the first layer to the data.
        prior: See :class:`VAE`; that of the last layer.
        likelihood: See :class:`VAE`.
        objective: ``"elbo"``, with options ``beta`` and ``kl_warmup_steps``.
        hidden_features: Widths of the hidden layers of the networks between stochastic layers, both ways.
        data_shape: Shape of one example.
        lr: Learning rate.
        baseline_lr: Learning rate of the layers' own parameters; ``lr`` if None.
        optimizer: Function of parameter groups that returns an optimizer; by default fused Adam. The groups have the
            learning rates above; one that the function states as well must be ``lr``.
        iwae_samples: Stage (``"val"`` or ``"test"``) -> number of draws of the importance-weighted bound logged there.

    Raises:
        ValueError: Parts that do not fit each other, or unknown names and options.

    References:
        Neural Variational Inference and Learning in Belief Networks (Andriy Mnih, Karol Gregor, 2014),
        https://arxiv.org/abs/1402.0030

    Example:
        >>> from lightning_modules import HierarchicalVAE
        >>> loo = {"name": "reinforce", "num_samples": 2, "baseline": "leave_one_out"}
        >>> model = HierarchicalVAE([{**loo, "latent_dim": 16}, {"name": "gaussian", "latent_dim": 4}])
        >>> [layer.name for layer in model.stochastic_layers], model.kl_method
        (['reinforce', 'gaussian'], 'analytic at the top, monte_carlo below')
    """

    def __init__(
        self,
        layers: Sequence[str | Mapping[str, Any] | StochasticLayer],
        *,
        encoder: str | Mapping[str, Any] | nn.Module = "mlp",
        decoder: str | Mapping[str, Any] | nn.Module = "mlp",
        prior: str | Mapping[str, Any] | Prior = "learned",
        likelihood: str | Mapping[str, Any] | Likelihood = "bernoulli",
        objective: str | Mapping[str, Any] | Objective = "elbo",
        hidden_features: Sequence[int] = (),
        data_shape: Sequence[int] = (1, 8, 8),
        lr: float = 1e-3,
        baseline_lr: float | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        iwae_samples: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(
            layers=layers,
            encoder=encoder,
            decoder=decoder,
            prior=prior,
            hidden_features=tuple(hidden_features),
            data_shape=data_shape,
            likelihood=likelihood,
            objective=objective,
            lr=lr,
            baseline_lr=baseline_lr,
            optimizer=optimizer,
            iwae_samples=iwae_samples,
        )
        if not isinstance(self.objective, ELBO) or self.objective.free_bits:
            raise ValueError(
                f"needed the objective 'elbo' without free_bits for a hierarchy, got {self.objective}; for the "
                "importance-weighted bound of a hierarchy pass iwae_samples, which evaluates it."
            )
        if not layers or isinstance(layers, str):
            raise ValueError(f"needed a list of layers, from the data upwards, got {layers!r}.")
        built = [build_layer(layer, None) for layer in layers]
        for layer in built[:-1]:
            if layer.family.name == "quantized":
                raise ValueError(
                    "needed layers with a density below the last one, as p(z | layer above) is evaluated at their "
                    f"draws, got {layer.name!r}, whose law is one point; make it the last, or take a categorical one."
                )
        self.layers = nn.ModuleList(built)
        self.prior = build_prior(prior, built[-1].family)
        first = built[0]
        self.encoder = build_encoder(encoder, self.data_shape, first.in_features)
        self.decoder = build_decoder(decoder, first.out_features, self.output_shape)
        pairs = list(pairwise(built))
        self.upwards = nn.ModuleList(MLPEncoder([a.out_features], b.in_features, hidden_features) for a, b in pairs)
        self.downwards = nn.ModuleList(MLPDecoder(b.out_features, [a.in_features], hidden_features) for a, b in pairs)
        self.kl_method = self._dry_run()
        self.evaluations = evaluations(first, (), None, self.iwae_samples)

    def _dry_run(self) -> str:
        """Send two examples through, so that parts that do not fit are found at construction."""
        with preserved(self), torch.no_grad():
            params = self._check_encoder()
            first, last = self.stochastic_layers[0], self.stochastic_layers[-1]
            if list(params.shape) != [2, first.in_features]:
                raise ValueError(
                    f"needed an encoder with outputs [N, {first.in_features}] for layer {first.name!r}, got "
                    f"{list(params.shape)}; its last layer has layer.in_features outputs."
                )
            self._check_decoder(first.mode(params))
            if not kl_is_known(last.distribution(torch.zeros(2, last.in_features)), self.prior(params.device)):
                return "monte_carlo"
        return "analytic" if first is last else "analytic at the top, monte_carlo below"

    @property
    def stochastic_layers(self) -> list[StochasticLayer]:
        return [layer for layer in self.layers if isinstance(layer, StochasticLayer)]

    @property
    def inference_networks(self) -> list[nn.Module]:
        return [self.encoder, *self.upwards]

    def encode(self, x: Tensor) -> Tensor:
        return one_tensor(self.encoder(x), "an encoder")

    def decode(self, z: Tensor) -> Tensor:
        return self._on_rows(self.decoder, z)

    def _above(self, level: int, z: Tensor) -> Tensor:
        """Params of q of the layer above ``level``, from its draws."""
        return self._on_rows(self.upwards[level], z)

    def _conditional(self, level: int, above: Tensor) -> Distribution:
        """p(z of ``level`` | z above)."""
        return self.stochastic_layers[level].distribution(self._on_rows(self.downwards[level], above))

    def terms(self, x: Tensor, params: Tensor | None = None) -> HierarchicalTerms:
        layers = self.stochastic_layers
        every = [self.encode(x) if params is None else params]
        samples = [layers[0].sample(every[0])]
        for level, layer in enumerate(layers[1:]):
            every.append(self._above(level, samples[-1].z))
            samples.append(layer.sample(every[-1]))
        log_priors = [
            layer.family.log_prob(self._conditional(level, above.z), below.z)
            for level, (layer, below, above) in enumerate(zip(layers[:-1], samples[:-1], samples[1:], strict=True))
        ]
        top, prior = samples[-1], self.prior(x.device)
        log_ratios: list[Tensor | None] = [sample.log_prob for sample in samples[:-1]]
        if self.kl_method == "monte_carlo":
            kl = None
            log_ratios.append(top.log_prob - layers[-1].family.log_prob(prior, top.z))
        else:
            kl = kl_per_latent(top.q, prior).sum(-1)
            log_ratios.append(None)
        log_likelihood = self.log_likelihood(samples[0].z, x)
        return HierarchicalTerms(tuple(every), tuple(samples), log_likelihood, tuple(log_ratios), tuple(log_priors), kl)

    def loss(self, terms: HierarchicalTerms) -> Tensor:
        assert isinstance(self.objective, ELBO)
        return terms.fold(1.0, self.objective.weight(self.global_step))

    def bound(self, terms: HierarchicalTerms) -> dict[str, Tensor]:
        reconstruction, kl = -terms.fold(1.0, 0.0), terms.fold(0.0, 1.0)
        return {"elbo": reconstruction - kl, "kl": kl, "reconstruction": reconstruction}

    def posterior(self, terms: HierarchicalTerms) -> Distribution:
        return terms.samples[0].q

    def log_weights(self, x: Tensor, params: Tensor, num_samples: int) -> Tensor:
        layers = self.stochastic_layers
        params = params.expand(num_samples, *params.shape)
        total = torch.zeros(params.shape[:-1], dtype=params.dtype, device=params.device)
        below: Tensor | None = None
        for level, layer in enumerate(layers):
            q = layer.distribution(params)
            z = layer.family.sample(q, 1).squeeze(0)
            total = total - layer.family.log_prob(q, z)
            if below is None:
                total = total + self.log_likelihood(z, x)
            else:
                total = total + layers[level - 1].family.log_prob(self._conditional(level - 1, z), below)
            below = z
            if level + 1 < len(layers):
                params = self._above(level, z)
        return total + layers[-1].family.log_prob(self.prior(x.device), z)

    def probed(self, terms: HierarchicalTerms, params: Tensor) -> list[tuple[Tensor, int]]:
        return [(params, 0), *((above, above.dim() - 2) for above in terms.params[1:])]

    @torch.no_grad()
    def generate(self, num_samples: int) -> Tensor:
        """Means of p(x | z_1) at ancestral draws from the prior: ``[num_samples, *data_shape]``."""
        layers = self.stochastic_layers
        z = layers[-1].family.sample(self.prior(self.device), num_samples)
        for level in range(len(layers) - 2, -1, -1):
            z = layers[level].family.sample(self._conditional(level, z), 1).squeeze(0)
        return self.likelihood.mean(self.decode(z))

    def _on_rows(self, network: nn.Module, z: Tensor) -> Tensor:
        """A network of rows ``[N, F]`` on ``[..., F]``."""
        rows = z.reshape(-1, z.shape[-1]).to(self.dtype)  # laws draw in float32 at least
        output = one_tensor(network(rows), "a decoder")
        return output.reshape(*z.shape[:-1], *output.shape[1:])
