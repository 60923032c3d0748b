"""A variational autoencoder around any stochastic layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer

from lightning_modules.base import LatentVariableModel
from lightning_modules.build import build_decoder, build_encoder, build_layer, build_prior
from lightning_modules.evaluation import evaluations
from lightning_modules.likelihoods import Likelihood
from lightning_modules.networks import one_tensor
from lightning_modules.objectives import ELBO, Objective, Terms
from lightning_modules.priors import Prior, kl_is_known, kl_per_latent
from stochastic_layers import StochasticLayer
from stochastic_layers.diagnostics import GradientStatistics, preserved

__all__ = ["VAE"]


class VAE(LatentVariableModel[Terms]):
    r"""A VAE: encoder, any stochastic layer, decoder; trained by one optimizer on one scalar loss.

    Logged, for the stages ``train``, ``val`` and ``test``: ``<stage>/elbo`` (nats per example, higher is better; in
    ``val`` and ``test`` a lower bound of log p(x) on exact draws of q with beta = 1, whatever was annealed),
    ``<stage>/kl``, ``<stage>/reconstruction`` (:math:`E_q \log p(x \mid z)`), ``<stage>/iwae`` where asked, and
    ``train/grad_variance`` and ``train/grad_snr``: total variance and signal-to-noise ratio of the gradient of the
    objective (all its terms) with respect to the layer's params, at fixed params and data, per example
    (:class:`~stochastic_layers.diagnostics.GradientStatistics`), by the :class:`GradientVarianceMonitor` that the model
    has unless the Trainer was given one. An objective other than the ELBO also logs its own value under its own name
    (``train/iwae``, ``train/tvo``, ...). Training values are those of the batch at every ``log_every_n_steps``.

    Every argument that names a part takes a name, a mapping ``{"name": ..., **options}``, or an object. Objects are not
    kept in checkpoints: pass them again to ``load_from_checkpoint``.

    Args:
        layer: A registered name, ``{"name": ..., **options}``, or a :class:`~stochastic_layers.StochasticLayer`.
        layer_options: Options of a named layer, beside those of a mapping. ``latent_dim`` defaults to the layer's
            ``default_latent_dim`` (32; less where outcomes are enumerated or codes are vectors), ``num_categories``
            to 8.
        encoder: ``"mlp"``, ``"conv"`` or a module ``[N, *data_shape]`` -> ``[N, layer.in_features]`` or, for latents at
            every position, ``[N, layer.in_features, *positions]``.
        decoder: ``"mlp"``, ``"conv"`` or a module ``[N, layer.out_features]`` (``[N, layer.out_features, *positions]``)
            -> ``[N, outputs_per_value * C, ...]``.
        prior: ``"standard"`` for the family's customary prior, ``"learned"``, or a :class:`Prior`.
        likelihood: ``"bernoulli"``, ``"categorical"``, ``"gaussian"``, ``"discretized_logistic"``, or a
            :class:`Likelihood`.
        objective: ``"elbo"``, ``"iwae"``, ``"renyi"``, ``"rws"``, ``"tvo"``, or an :class:`Objective`; a mapping
            such as ``{"name": "iwae", "gradient": "dreg"}`` sets options.
        data_shape: Shape of one example.
        lr: Learning rate.
        baseline_lr: Learning rate of the layer's own parameters (learned baselines, control variates); ``lr`` if None.
        optimizer: Function of parameter groups that returns an optimizer; by default fused Adam. The groups have the
            learning rates above; one that the function states as well must be ``lr``.
        iwae_samples: Stage (``"val"`` or ``"test"``) -> number of draws of the importance-weighted bound logged there.

    Raises:
        ValueError: Parts that do not fit each other, or unknown names and options.

    Example:
        >>> from lightning_modules import VAE
        >>> model = VAE("reinforce", {"latent_dim": 16, "num_samples": 4, "baseline": "leave_one_out"})
        >>> model.layer.name, model.kl_method
        ('reinforce', 'analytic')
    """

    def __init__(
        self,
        layer: str | StochasticLayer | Mapping[str, Any] = "straight_through",
        layer_options: Mapping[str, Any] | None = None,
        *,
        encoder: str | Mapping[str, Any] | nn.Module = "mlp",
        decoder: str | Mapping[str, Any] | nn.Module = "mlp",
        prior: str | Mapping[str, Any] | Prior = "standard",
        likelihood: str | Mapping[str, Any] | Likelihood = "bernoulli",
        objective: str | Mapping[str, Any] | Objective = "elbo",
        data_shape: Sequence[int] = (1, 8, 8),
        lr: float = 1e-3,
        baseline_lr: float | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        iwae_samples: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(
            layer=layer,
            layer_options=layer_options,
            encoder=encoder,
            decoder=decoder,
            prior=prior,
            data_shape=data_shape,
            likelihood=likelihood,
            objective=objective,
            lr=lr,
            baseline_lr=baseline_lr,
            optimizer=optimizer,
            iwae_samples=iwae_samples,
        )
        # encoder and decoder start alike, whatever the layer draws for its own parameters
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(int(torch.randint(2**62, ())))
            self.layer = build_layer(layer, layer_options)
        self.objective.check(self.layer)
        self.prior = build_prior(prior, self.layer.family)
        self.encoder = build_encoder(encoder, self.data_shape, self.layer.in_features)
        self.decoder = build_decoder(decoder, self.layer.out_features, self.output_shape)
        self.kl_method = self._dry_run()
        if isinstance(self.objective, ELBO) and self.objective.free_bits and self.kl_method != "analytic":
            raise ValueError(
                f"needed a closed-form KL per latent variable for free_bits, got none for family "
                f"{self.layer.family.name!r} with the prior {type(self.prior).__name__}; set free_bits=0."
            )
        self.evaluations = evaluations(self.layer, self.latent_shape, self._num_kl_terms, self.iwae_samples)

    @property
    def stochastic_layers(self) -> list[StochasticLayer]:
        return [self.layer]

    @property
    def inference_networks(self) -> list[nn.Module]:
        return [self.encoder]

    def _dry_run(self) -> str:
        """Send two examples through, so that parts that do not fit are found at construction."""
        modes = {m: m.training for m in self.modules()}
        try:
            with preserved(self), torch.no_grad():
                self.eval()
                params = self._check_encoder()
                if params.shape[-1] != self.layer.in_features or params.shape[0] != 2:
                    raise ValueError(
                        f"needed an encoder with outputs [N, {self.layer.in_features}] (or [N, "
                        f"{self.layer.in_features}, *positions]) for layer {self.layer.name!r}, got "
                        f"{list(params.movedim(-1, 1).shape)}; its last layer has layer.in_features outputs."
                    )
                self.latent_shape = tuple(params.shape[1:-1])
                q = self.layer.distribution(params)
                self._check_decoder(self.layer.mode(params))
                known = kl_is_known(q, self.prior(params.device))
        finally:  # parts of a model that was refused stay in the caller's hands, and in training mode
            for module, training in modes.items():
                module.training = training
        return "analytic" if known else "monte_carlo"

    def encode(self, x: Tensor) -> Tensor:
        """Data ``[B, *data_shape]`` -> params ``[B, *positions, layer.in_features]``."""
        params = one_tensor(self.encoder(x), "an encoder")
        return params.movedim(1, -1) if params.dim() > 2 else params

    def decode(self, z: Tensor) -> Tensor:
        """z ``[..., *positions, layer.out_features]`` -> decoder outputs ``[..., outputs_per_value * C, ...]``."""
        positions = len(self.latent_shape)
        lead = z.shape[: z.dim() - 1 - positions]
        flat = z.reshape(-1, *z.shape[z.dim() - 1 - positions :]).to(self.dtype)  # laws draw in float32 at least
        output = one_tensor(self.decoder(flat.movedim(-1, 1) if positions else flat), "a decoder")
        return output.reshape(*lead, *output.shape[1:])

    def terms(self, x: Tensor, params: Tensor | None = None) -> Terms:
        """One batch ``[B, *data_shape]`` through the model; ``params`` stand for ``encode(x)`` if given."""
        params = self.encode(x) if params is None else params
        sample = self.layer.sample(params, self.context(self.layer, x, params))
        objective, z = self.objective, sample.z
        if objective.detaches_draws:
            z = z.detach().requires_grad_(objective.stops_q and torch.is_grad_enabled())
        kl, log_prior, log_q = self.closed_form_kl(sample.q), None, None
        if kl is None or objective.needs_log_weights:
            q = self.layer.distribution(params.detach()) if objective.stops_q else sample.q
            cut = objective.detaches_draws or objective.stops_q
            log_q = _per_example(self.layer.family.log_prob(q, z) if cut else sample.log_prob)
            log_prior = _per_example(self.layer.family.log_prob(self.prior(x.device), z))
        return Terms(sample, self.log_likelihood(z, x), log_prior, log_q, kl, z if objective.detaches_draws else None)

    def loss(self, terms: Terms) -> Tensor:
        return self.objective.loss(terms, self.global_step)

    def bound(self, terms: Terms) -> dict[str, Tensor]:
        weights = terms.sample.weights
        weights = weights.reshape(*weights.shape, *[1] * (2 - weights.dim()))
        reconstruction = (weights * terms.log_likelihood).sum(0)
        if terms.kl is not None:
            kl = terms.kl.sum(-1)
        else:
            assert terms.log_q is not None and terms.log_prior is not None
            kl = (weights * (terms.log_q - terms.log_prior)).sum(0)
        return {"elbo": reconstruction - kl, "kl": kl, "reconstruction": reconstruction}

    def posterior(self, terms: Terms) -> Distribution:
        return terms.sample.q

    def kl_of_latents(self, terms: Terms) -> Tensor | None:
        return terms.kl

    def log_weights(self, x: Tensor, params: Tensor, num_samples: int) -> Tensor:
        q = self.layer.distribution(params)
        z = self.layer.family.sample(q, num_samples)
        log_ratio = self.layer.family.log_prob(self.prior(x.device), z) - self.layer.family.log_prob(q, z)
        return self.log_likelihood(z, x) + _per_example(log_ratio)

    def context(self, layer: StochasticLayer, x: Tensor, params: Tensor) -> Tensor | None:
        """The data ``[B, F]``, if a learned baseline of the layer was sized for them rather than for params."""
        features = getattr(getattr(layer, "baseline", None), "context_features", layer.in_features)
        wants_data = features == math.prod(self.data_shape) != layer.in_features
        return x.flatten(1) if params.dim() == 2 and wants_data else None

    @property
    def _num_kl_terms(self) -> int | None:
        """Number L of the columns of :attr:`Terms.kl`."""
        kl = self.closed_form_kl(self.layer.distribution(torch.zeros(1, *self.latent_shape, self.layer.in_features)))
        return None if kl is None else kl.shape[1]

    def closed_form_kl(self, q: Distribution) -> Tensor | None:
        """KL(q || prior) per latent variable ``[B, L]``, ``None`` where it has no closed form."""
        if self.kl_method != "analytic":
            return None
        return kl_per_latent(q, self.prior(self.device)).flatten(1)

    @torch.no_grad()
    def generate(self, num_samples: int) -> Tensor:
        """Means of p(x | z) at draws z of the prior: ``[num_samples, *data_shape]``."""
        shape = torch.Size((num_samples, *self.latent_shape))
        prior = self.prior(self.device).expand(shape) if self.latent_shape else self.prior(self.device)
        if self.latent_shape:
            z = self.layer.family.sample(prior, 1).squeeze(0)
        else:
            z = self.layer.family.sample(prior, num_samples)
        return self.likelihood.mean(self.decode(z))

    def gradient_statistics(self, x: Tensor, num_draws: int = 64) -> GradientStatistics:
        """Moments of the gradient of the objective at the layer's params and fixed data; see :meth:`probe`.

        Args:
            x: Data ``[B, *data_shape]``.
            num_draws: Number of redraws of the noise.
        """
        (statistics,) = self.probe(x, num_draws)
        return statistics


def _per_example(log_prob: Tensor) -> Tensor:
    """``[S, B, *positions]`` -> ``[S, B]``."""
    return log_prob.flatten(2).sum(-1) if log_prob.dim() > 2 else log_prob
