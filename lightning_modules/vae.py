"""A variational autoencoder around any stochastic layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer

from lightning_modules.build import (
    build_decoder,
    build_encoder,
    build_layer,
    build_likelihood,
    build_objective,
    build_prior,
)
from lightning_modules.likelihoods import Likelihood
from lightning_modules.noise import ReproducibleNoise
from lightning_modules.objectives import Objective, Terms
from lightning_modules.priors import Prior, kl_per_latent
from stochastic_layers import StochasticLayer
from stochastic_layers.diagnostics import GradientStatistics, gradient_statistics, preserved

__all__ = ["VAE", "data_of", "log_interval"]

_OBJECT = "<object>"  # stands in the saved hyperparameters for an argument that was an object
PROBE_EXAMPLES = 16
PROBE_DRAWS = 8
MAX_POINTS = 16_384  # decoder evaluations in one chunk of the importance-weighted bound


class VAE(LightningModule):
    r"""A VAE: encoder, any stochastic layer, decoder; trained by one optimizer on one scalar loss.

    Logged, for the stages ``train``, ``val`` and ``test``: ``<stage>/elbo`` (nats per example, higher is better; in
    ``val`` and ``test`` a lower bound of log p(x) on exact draws of q with beta = 1, whatever was annealed),
    ``<stage>/kl``, ``<stage>/reconstruction`` (:math:`E_q \log p(x \mid z)`), ``<stage>/iwae`` where asked, and
    ``train/grad_variance`` and ``train/grad_snr``: total variance and signal-to-noise ratio of the estimator of the
    gradient with respect to the layer's params, at fixed params and data, per example
    (:class:`~stochastic_layers.diagnostics.GradientStatistics`). Training values are those of the batch at every
    ``log_every_n_steps``.

    Every argument that names a part takes a name, a mapping ``{"name": ..., **options}``, or an object. Objects are not
    kept in checkpoints: pass them again to ``load_from_checkpoint``.

    Args:
        layer: A registered name or a :class:`~stochastic_layers.StochasticLayer`.
        layer_options: Options of a named layer. ``latent_dim`` defaults to the layer's ``default_latent_dim`` (32; 3
            where outcomes are enumerated), ``num_categories`` to 8.
        encoder: ``"mlp"``, ``"conv"`` or a module ``[N, *data_shape]`` -> ``[N, layer.in_features]`` or, for latents at
            every position, ``[N, layer.in_features, *positions]``.
        decoder: ``"mlp"``, ``"conv"`` or a module ``[N, layer.out_features]`` (``[N, layer.out_features, *positions]``)
            -> ``[N, outputs_per_value * C, ...]``.
        prior: ``"standard"`` for the family's customary prior, ``"learned"``, or a :class:`Prior`.
        likelihood: ``"bernoulli"``, ``"categorical"``, ``"gaussian"``, ``"discretized_logistic"``, or a
            :class:`Likelihood`.
        objective: ``"elbo"``, ``"iwae"``, or an :class:`Objective`; ``{"name": "elbo", "beta": 4.0}`` sets options.
        data_shape: Shape of one example.
        lr: Learning rate.
        baseline_lr: Learning rate of the layer's own parameters (learned baselines, control variates); ``lr`` if None.
        optimizer: Function of parameter groups that returns an optimizer; by default fused Adam.
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
        layer: str | StochasticLayer = "straight_through",
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
        super().__init__()
        options = dict(
            layer=layer,
            layer_options=layer_options,
            encoder=encoder,
            decoder=decoder,
            prior=prior,
            likelihood=likelihood,
            objective=objective,
            data_shape=tuple(data_shape),
            lr=lr,
            baseline_lr=baseline_lr,
            optimizer=optimizer,
            iwae_samples=iwae_samples,
        )
        for name, value in options.items():
            if isinstance(value, str) and value == _OBJECT:
                raise ValueError(
                    f"needed {name}=..., got a checkpoint of a model whose {name} was an object, which checkpoints do "
                    f"not keep; pass the same object: VAE.load_from_checkpoint(path, {name}=...)."
                )
        self.save_hyperparameters({name: _plain(value) for name, value in options.items()})

        self.data_shape = tuple(data_shape)
        self.layer = build_layer(layer, layer_options)
        self.likelihood = build_likelihood(likelihood)
        self.prior = build_prior(prior, self.layer.family)
        self.objective = build_objective(objective)
        self.objective.check(self.layer)
        channels, *rest = self.data_shape
        output_shape = (channels * self.likelihood.outputs_per_value, *rest)
        self.encoder = build_encoder(encoder, self.data_shape, self.layer.in_features)
        self.decoder = build_decoder(decoder, self.layer.out_features, output_shape)
        self.lr = lr
        self.baseline_lr = lr if baseline_lr is None else baseline_lr
        self.make_optimizer = optimizer or _fused_adam
        self.iwae_samples = dict(iwae_samples or {})
        if unknown := set(self.iwae_samples) - {"val", "test"}:
            raise ValueError(f"needed the stages 'val' and 'test' in iwae_samples, got {sorted(unknown)}.")
        self.latent_shape, self.kl_method = self._dry_run(output_shape)

    def _dry_run(self, output_shape: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """Send two examples through, so that parts that do not fit are found at construction."""
        modes = {m: m.training for m in self.modules()}
        with preserved(self), torch.no_grad():
            self.eval()
            params = self.encode(torch.zeros(2, *self.data_shape))
            if params.shape[-1] != self.layer.in_features or params.shape[0] != 2:
                raise ValueError(
                    f"needed an encoder with outputs [N, {self.layer.in_features}] (or [N, {self.layer.in_features}, "
                    f"*positions]) for layer {self.layer.name!r}, got {list(params.movedim(-1, 1).shape)}; its last "
                    "layer has layer.in_features outputs."
                )
            q = self.layer.distribution(params)
            output = self.decode(self.layer.mode(params))
            if list(output.shape) != [2, *output_shape]:
                raise ValueError(
                    f"needed a decoder with outputs [N, {', '.join(map(str, output_shape))}] for likelihood "
                    f"{self.likelihood.name!r}, got {list(output.shape)}."
                )
            try:
                kl_per_latent(q, self.prior(params.device))
                kl_method = "analytic"
            except NotImplementedError:
                kl_method = "monte_carlo"
        for module, training in modes.items():
            module.training = training
        return tuple(params.shape[1:-1]), kl_method

    def encode(self, x: Tensor) -> Tensor:
        """Data ``[B, *data_shape]`` -> params ``[B, *positions, layer.in_features]``."""
        params: Tensor = self.encoder(x)
        return params.movedim(1, -1) if params.dim() > 2 else params

    def decode(self, z: Tensor) -> Tensor:
        """z ``[..., *positions, layer.out_features]`` -> decoder outputs ``[..., outputs_per_value * C, ...]``."""
        positions = getattr(self, "latent_shape", None)
        positions = z.dim() - 2 if positions is None else len(positions)  # the dry run has one leading dimension
        lead = z.shape[: z.dim() - 1 - positions]
        flat = z.reshape(-1, *z.shape[z.dim() - 1 - positions :])
        output: Tensor = self.decoder(flat.movedim(-1, 1) if positions else flat)
        return output.reshape(*lead, *output.shape[1:])

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats ``[..., B]`` of z ``[..., B, *positions, out_features]``."""
        return self.likelihood.log_prob(self.decode(z).float(), x)

    def terms(self, x: Tensor) -> Terms:
        """One batch ``[B, *data_shape]`` through the model."""
        params = self.encode(x)
        sample = self.layer.sample(params, x.flatten(1) if params.dim() == 2 and self._wants_data else None)
        kl, log_prior, log_q = self._kl(sample.q), None, None
        if kl is None or self.objective.needs_log_weights:
            log_prior = _per_example(self.layer.family.log_prob(self.prior(x.device), sample.z))
            log_q = _per_example(sample.log_prob)
        return Terms(sample, self.log_likelihood(sample.z, x), log_prior, log_q, kl)

    @property
    def _wants_data(self) -> bool:
        """Whether a learned baseline was sized for the data rather than for the layer's params."""
        features = getattr(getattr(self.layer, "baseline", None), "context_features", self.layer.in_features)
        return bool(features == math.prod(self.data_shape) != self.layer.in_features)

    def _kl(self, q: Distribution) -> Tensor | None:
        """Closed-form KL per latent variable ``[B, L]``."""
        if self.kl_method != "analytic":
            return None
        return kl_per_latent(q, self.prior(self.device)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct data: see :meth:`reconstruct`."""
        return self.reconstruct(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x | z) at the mode of q(z | x): ``[B, *data_shape]``."""
        return self.likelihood.mean(self.decode(self.layer.mode(self.encode(x))))

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

    @torch.no_grad()
    def importance_weighted_bound(self, x: Tensor, num_samples: int) -> Tensor:
        """log 1/K sum_k p(x, z_k) / q(z_k | x) ``[B]`` in nats with exact draws, in chunks of bounded memory.

        Args:
            x: Data ``[B, *data_shape]``.
            num_samples: Number K of draws; the bound rises to log p(x) with it.
        """
        q = self.layer.distribution(self.encode(x))
        total = x.new_full((x.shape[0],), -math.inf)
        chunk = max(1, MAX_POINTS // max(1, x.shape[0]))
        for start in range(0, num_samples, chunk):
            z = self.layer.family.sample(q, min(chunk, num_samples - start))
            log_ratio = self.layer.family.log_prob(self.prior(x.device), z) - self.layer.family.log_prob(q, z)
            log_weights = self.log_likelihood(z, x) + _per_example(log_ratio)
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        return total - math.log(num_samples)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = data_of(batch)
        if self.global_step == 0 and batch_idx == 0:
            self._first_batch(x)
        due = self._logging_is_due
        if due:
            self._log_gradient(x)
        terms = self.terms(x)
        if due:
            self._log_bound("train", terms, len(x))
        return self.objective.loss(terms, self.global_step).mean()

    @property
    def _logging_is_due(self) -> bool:
        # logging costs more than a small step, so it is done only where the Trainer writes it out
        return self._trainer is not None and (self.global_step + 1) % log_interval(self._trainer) == 0

    def _log_bound(self, stage: str, terms: Terms, batch_size: int) -> Tensor:
        """Log the terms of the bound with beta = 1."""
        with torch.no_grad():
            weights = terms.sample.weights
            log_likelihood = terms.log_likelihood
            reconstruction = (
                (weights.reshape(*weights.shape, *[1] * (2 - weights.dim())) * log_likelihood).sum(0).mean()
            )
            if terms.kl is not None:
                kl = terms.kl.sum(-1).mean()
            else:
                assert terms.log_q is not None and terms.log_prior is not None
                kl = (terms.log_q - terms.log_prior).mean()
            values = {"elbo": reconstruction - kl, "kl": kl, "reconstruction": reconstruction}
        self._log_all(stage, values, batch_size)
        return values["elbo"]

    def _log_all(self, stage: str, values: Mapping[str, Tensor | float], batch_size: int) -> None:
        train = stage == "train"
        for name, value in values.items():
            self.log(
                f"{stage}/{name}",
                value,
                on_step=train,
                on_epoch=not train,
                prog_bar=name == "elbo",
                batch_size=batch_size,
                sync_dist=True,
            )

    def _log_gradient(self, x: Tensor) -> None:
        statistics = self.gradient_statistics(x[:PROBE_EXAMPLES], num_draws=PROBE_DRAWS)
        values = {"grad_variance": statistics.total_variance, "grad_snr": statistics.snr}
        self._log_all("train", values, len(x))

    def gradient_statistics(self, x: Tensor, num_draws: int = 64) -> GradientStatistics:
        """Moments of the estimator of d E_q[-log p(x | z)] / d params at fixed data; disturbs neither noise nor state.

        Args:
            x: Data ``[B, *data_shape]``.
            num_draws: Number of redraws of the noise.
        """
        with preserved(self.encoder, self.decoder, self.layer):
            with torch.no_grad():
                params = self.encode(x)
            context = x.flatten(1) if self._wants_data else None

            def cost(z: Tensor) -> Tensor:
                return -self.log_likelihood(z, x)

            return gradient_statistics(self.layer, params, cost, num_draws=num_draws, context=context)

    def _first_batch(self, x: Tensor) -> None:
        if self.likelihood.binary and not bool(((x == 0) | (x == 1)).all()):
            rank_zero_warn(
                "the Bernoulli likelihood got data other than 0 and 1: its ELBO is then no bound of a log-likelihood. "
                "Binarize the data, or use likelihood='categorical', 'gaussian' or 'discretized_logistic'."
            )

    def on_fit_start(self) -> None:
        rank_zero_info(f"VAE: layer {self.layer.name!r}, objective {self.objective}, KL {self.kl_method}.")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", data_of(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", data_of(batch))

    def _evaluate(self, stage: str, x: Tensor) -> None:
        self._log_bound(stage, self.terms(x), len(x))
        if self.iwae_samples.get(stage):
            bound = self.importance_weighted_bound(x, self.iwae_samples[stage]).mean()
            self._log_all(stage, {"iwae": bound}, len(x))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Latent codes: the mode of q, ``[B, *positions, out_features]``."""
        return self.layer.mode(self.encode(data_of(batch)))

    def configure_optimizers(self) -> Optimizer:
        own = {id(p) for p in self.layer.parameters()}
        groups = [
            {"params": [p for p in self.parameters() if id(p) not in own], "lr": self.lr},
            {"params": list(self.layer.parameters()), "lr": self.baseline_lr},
        ]
        return self.make_optimizer([group for group in groups if group["params"]])

    def configure_callbacks(self) -> list[Callback]:
        if any(isinstance(c, ReproducibleNoise) for c in cast(Any, self.trainer).callbacks):
            return []
        return [ReproducibleNoise()]


def log_interval(trainer: Trainer) -> int:
    """``log_every_n_steps`` of a Trainer, in optimizer steps."""
    return max(1, int(cast(Any, trainer).log_every_n_steps))


def _fused_adam(groups: Iterable[Any]) -> Optimizer:
    return torch.optim.Adam(groups, fused=True)


def data_of(batch: Any) -> Tensor:
    """The data x of a batch ``(x, ...)`` or x."""
    x: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
    return x


def _per_example(log_prob: Tensor) -> Tensor:
    """``[S, B, *positions]`` -> ``[S, B]``."""
    return log_prob.flatten(2).sum(-1) if log_prob.dim() > 2 else log_prob


def _plain(value: Any) -> Any:
    """A hyperparameter as plain data, which a checkpoint can hold; objects leave a mark."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else _OBJECT
