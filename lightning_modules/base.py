"""What latent-variable models share: the training loop, the log, evaluation, checkpoints and the gradient probe."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer

from lightning_modules.build import build_likelihood, build_objective, build_optimizer, optimizer_function
from lightning_modules.due import log_interval, step_is_due
from lightning_modules.evaluation import Evaluation, evaluation_loader, unpadded
from lightning_modules.hyperparameters import example_shape, plain_options
from lightning_modules.likelihoods import Likelihood, at_least_float32
from lightning_modules.metrics import importance_statistics
from lightning_modules.noise import own_noise
from lightning_modules.objectives import Objective
from lightning_modules.probe import probe_params
from lightning_modules.ranks import check_equal_batches, check_strategy, mean_over_ranks
from lightning_modules.untrusted import WeightsOnly
from stochastic_layers import StochasticLayer
from stochastic_layers.diagnostics import GradientStatistics
from stochastic_layers.options import check_positive, check_positive_int

__all__ = ["LatentVariableModel", "data_of"]

MAX_POINTS = 16_384  # decoder evaluations in one chunk of the importance-weighted bound

_Terms = TypeVar("_Terms")


class LatentVariableModel(WeightsOnly, Generic[_Terms]):
    """Base of models p(x, z), q(z | x) that one optimizer trains on one scalar loss; :class:`VAE` says what is logged.

    Args:
        data_shape: Shape of one example.
        likelihood: See :class:`VAE`.
        objective: See :class:`VAE`.
        lr: See :class:`VAE`.
        baseline_lr: See :class:`VAE`.
        optimizer: See :class:`VAE`.
        iwae_samples: See :class:`VAE`.
        **parts: The further arguments of the subclass, kept in the checkpoint with those above.
    """

    latent_shape: tuple[int, ...] = ()
    kl_method: str
    evaluations: nn.ModuleDict  # the metrics of the stages "val" and "test", which a subclass makes when it is built
    best_elbo: float = -math.inf

    def __init__(
        self,
        *,
        data_shape: Sequence[int],
        likelihood: str | Mapping[str, Any] | Likelihood,
        objective: str | Mapping[str, Any] | Objective,
        lr: float,
        baseline_lr: float | None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None,
        iwae_samples: Mapping[str, int] | None,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.data_shape = example_shape(data_shape)
        options = dict(
            parts,
            data_shape=self.data_shape,
            likelihood=likelihood,
            objective=objective,
            lr=lr,
            baseline_lr=baseline_lr,
            optimizer=optimizer,
            iwae_samples=iwae_samples,
        )
        self.save_hyperparameters(plain_options(type(self).__name__, options))
        self.likelihood = build_likelihood(likelihood)
        self.likelihood.event_dims = len(self.data_shape)
        self.objective = build_objective(objective)
        self.lr = check_positive("lr", lr, or_zero=True)
        self.baseline_lr = None if baseline_lr is None else check_positive("baseline_lr", baseline_lr, or_zero=True)
        self.make_optimizer = optimizer_function(optimizer)
        self.iwae_samples = dict(iwae_samples or {})
        if unknown := set(self.iwae_samples) - {"val", "test"}:
            raise ValueError(f"needed the stages 'val' and 'test' in iwae_samples, got {sorted(unknown)}.")
        for stage, draws in self.iwae_samples.items():
            check_positive_int(f"iwae_samples[{stage!r}]", draws, "0 is none", least=0)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the decoder's output for one example."""
        channels, *rest = self.data_shape
        return (channels * self.likelihood.outputs_per_value, *rest)

    def _check_decoder(self, z: Tensor) -> None:
        """Send z of two examples through the decoder, so that one that does not fit is found at construction."""
        try:
            shape = list(self.decode(z).shape)
        except RuntimeError as error:
            raise ValueError(
                f"needed a decoder of z {list(z.shape)}, got {type(self.decoder).__name__}, which fails: {error}; its "
                "first layer has layer.out_features inputs."
            ) from error
        if shape != [2, *self.output_shape]:
            raise ValueError(
                f"needed a decoder with outputs [N, {', '.join(map(str, self.output_shape))}] for likelihood "
                f"{self.likelihood.name!r}, got {shape}; end it with nn.Unflatten(1, {self.output_shape}), or pass the "
                "data_shape of your data."
            )

    def _check_encoder(self) -> Tensor:
        """The params of two empty examples, which the encoder takes if it fits the data."""
        try:
            return self.encode(torch.zeros(2, *self.data_shape))
        except RuntimeError as error:
            raise ValueError(
                f"needed an encoder of data {[2, *self.data_shape]}, got {type(self.encoder).__name__}, which fails: "
                f"{error}; pass the data_shape of your data, one example's without the batch."
            ) from error

    def check_data(self, x: Tensor) -> None:
        """Refuse a batch that is not ``[B, *data_shape]``.

        Raises:
            ValueError: It has another shape, is of another precision, or holds integers.
        """
        if not x.is_floating_point():
            raise ValueError(f"needed floating-point data, got {x.dtype}; convert them, x.float() or x.float() / 255.")
        if (x.dtype == torch.float64) != (self.dtype == torch.float64):
            raise ValueError(
                f"needed data in the precision of the model, {self.dtype}, got {x.dtype}; convert them, x.to("
                f"{self.dtype}), or set the Trainer's precision: 64-true takes the model to float64."
            )
        if x.shape[1:] != self.data_shape:
            raise ValueError(
                f"needed data [N, {', '.join(map(str, self.data_shape))}], got {list(x.shape)}; build the model with "
                f"data_shape={tuple(x.shape[1:])}; the command line takes it from the attribute data_shape of the data "
                "module."
            )

    @property
    @abstractmethod
    def stochastic_layers(self) -> list[StochasticLayer]:
        """The layers, from the data upwards."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Data ``[B, *data_shape]`` -> params of the first layer."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """z of the first layer ``[..., *positions, out_features]`` -> decoder outputs."""

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats ``[..., B]`` of z ``[..., B, *positions, out_features]``, in float32 at least."""
        return self.likelihood.log_prob(at_least_float32(self.decode(z)), at_least_float32(x))

    @abstractmethod
    def terms(self, x: Tensor, params: Tensor | None = None) -> _Terms:
        """One batch ``[B, *data_shape]`` through the model; ``params`` stand for those of :meth:`encode` if given."""

    @abstractmethod
    def loss(self, terms: _Terms) -> Tensor:
        """The training loss ``[B]``."""

    @abstractmethod
    def bound(self, terms: _Terms) -> dict[str, Tensor]:
        """``elbo``, ``kl`` and ``reconstruction`` ``[B]``, with beta = 1."""

    @abstractmethod
    def posterior(self, terms: _Terms) -> Distribution:
        """q of the first layer, with batch shape ``[B, *positions]``."""

    def kl_of_latents(self, terms: _Terms) -> Tensor | None:
        """Closed-form KL of each latent variable from a prior that is fixed given nothing else, ``[B, L]``, or None."""
        return None

    @abstractmethod
    def log_weights(self, x: Tensor, params: Tensor, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z) ``[num_samples, B]`` at exact draws z of q."""

    def probed(self, terms: _Terms, params: Tensor) -> list[tuple[Tensor, int]]:
        """The params of every layer in ``terms`` with their batch dimension; ``params`` were those of the first."""
        return [(params, 0)]

    @property
    @abstractmethod
    def inference_networks(self) -> list[nn.Module]:
        """The network that makes the params of each layer, from the data upwards."""

    @abstractmethod
    def generate(self, num_samples: int) -> Tensor:
        """Means of p(x | z) at draws z of the prior: ``[num_samples, *data_shape]``."""

    @property
    def title(self) -> str:
        """What is trained, for a report."""
        return " over ".join(f"layer {layer.name!r}" for layer in reversed(self.stochastic_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct data: see :meth:`reconstruct`."""
        return self.reconstruct(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x | z) at the mode of q(z | x): ``[B, *data_shape]``."""
        return self.likelihood.mean(self.decode(self.stochastic_layers[0].mode(self.encode(x))))

    @torch.no_grad()
    def importance_weighted_bound(self, x: Tensor, num_samples: int) -> Tensor:
        """log 1/K sum_k p(x, z_k) / q(z_k | x) ``[B]`` in nats with exact draws, in chunks of bounded memory.

        Args:
            x: Data ``[B, *data_shape]``.
            num_samples: Number K of draws; the bound rises to log p(x) with it.
        """
        bound, _ = importance_statistics(self.log_weight_chunks(x, num_samples))
        return bound.to(at_least_float32(x).dtype)

    def log_weight_chunks(self, x: Tensor, num_samples: int) -> Iterator[Tensor]:
        """:meth:`log_weights` at ``num_samples`` draws in all, ``[K_i, B]`` at a time, each of bounded memory."""
        params = self.encode(x)
        chunk = max(1, MAX_POINTS // max(1, x.shape[0]))
        for start in range(0, num_samples, chunk):
            yield self.log_weights(x, params, min(chunk, num_samples - start))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = data_of(batch)
        if self.global_step == 0 and batch_idx == 0:
            self._first_batch(x)
        terms = self.terms(x)
        loss = self.loss(terms)
        if self._logging_is_due:
            self._log_training(terms, loss, len(x))
        return mean_over_ranks(loss)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # Lightning's log inspects its caller: not traceable
    def _log_training(self, terms: _Terms, loss: Tensor, batch_size: int) -> None:
        with torch.no_grad():
            values = {name: mean_over_ranks(value) for name, value in self.bound(terms).items()}
            if self.objective.name != "elbo":  # under its own name: the value of another objective is no ELBO
                values[self.objective.name] = mean_over_ranks(-loss)
        for name, value in values.items():
            self.log(
                f"train/{name}",
                value,
                on_step=True,
                on_epoch=False,
                prog_bar=name == "elbo",
                batch_size=batch_size,
                sync_dist=True,
            )

    @property
    def _logging_is_due(self) -> bool:
        # logging costs more than a small step, so it is done only where the Trainer writes it out
        return self._trainer is not None and step_is_due(self._trainer, log_interval(self._trainer))

    def probe(self, x: Tensor, num_draws: int) -> list[GradientStatistics]:
        """Moments of the gradient of the training loss at each layer's params: see :func:`probe_params`.

        Args:
            x: Data ``[B, *data_shape]``.
            num_draws: Number of redraws of the noise, at least 2.

        Raises:
            ValueError: Too few redraws, or a model in evaluation mode, which has no estimator.
        """
        return probe_params(self, x, num_draws)

    def _first_batch(self, x: Tensor) -> None:
        self.check_data(x)
        if self.likelihood.binary and not bool(((x == 0) | (x == 1)).all()):
            rank_zero_warn(
                "the Bernoulli likelihood got data other than 0 and 1: its ELBO is then no bound of a log-likelihood. "
                "Binarize the data, or use likelihood='categorical', 'gaussian' or 'discretized_logistic'."
            )
        if self.likelihood.unit_interval and not float((x - 0.5).abs().max()) <= 0.501:
            raise ValueError(
                f"needed data from 0 to 1 for likelihood {self.likelihood.name!r}, got from {float(x.min()):.3g} to "
                f"{float(x.max()):.3g}; divide 8-bit data by 255, or use likelihood='gaussian'."
            )

    def on_fit_start(self) -> None:
        for layer, network in zip(self.stochastic_layers, self.inference_networks, strict=True):
            if not layer.training and any(p.requires_grad for p in network.parameters()):
                raise ValueError(
                    f"needed layer {layer.name!r} in training mode, got eval(), where its draws carry no gradient to "
                    "the network before it; call model.train()."
                )
        rank_zero_info(f"{type(self).__name__}: {self.title}, objective {self.objective}, KL {self.kl_method}.")

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.global_step == 0:
            self.best_elbo = -math.inf  # of this run, not of an earlier one; a checkpoint is read after this
        check_strategy(self.trainer.strategy)
        # Lightning would convert after it has loaded a checkpoint, and so round one in double precision
        self.trainer.precision_plugin.convert_module(self)

    def on_train_start(self) -> None:
        check_equal_batches(self.trainer.num_training_batches, self.device)

    def evaluation(self, stage: str) -> Evaluation:
        """The metrics of a stage, ``"val"`` or ``"test"``."""
        return cast(Evaluation, self.evaluations[stage])

    def on_validation_epoch_start(self) -> None:
        self.evaluation("val").reset()

    def on_test_epoch_start(self) -> None:
        self.evaluation("test").reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", data_of(batch), batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", data_of(batch), batch_idx)

    def _evaluate(self, stage: str, x: Tensor, batch_idx: int) -> None:
        """Update and log the metrics of a stage by the examples of x that are no padding."""
        if batch_idx == 0 and self.trainer.state.fn != "fit":
            self._first_batch(x)
        self.check_data(x)
        count = unpadded(evaluation_loader(self.trainer), batch_idx)
        evaluation, params = self.evaluation(stage), self.encode(x)
        terms = self.terms(x, params)
        bound, kl, q = self.bound(terms), self.kl_of_latents(terms), self.posterior(terms)
        evaluation.update(bound, kl, q, params, count)
        if evaluation.iwae is not None:
            chunks = self.log_weight_chunks(x, self.iwae_samples[stage])
            evaluation.iwae.update(log_weights[:, :count] for log_weights in chunks)
        for name, metric in evaluation.scalars().items():
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "elbo")

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking or self.trainer.state.fn != "fit":
            return
        self.best_elbo = max(self.best_elbo, float(self.evaluation("val").elbo.compute()))
        self.log("val/elbo_best", self.best_elbo, reduce_fx="max", sync_dist=True)  # the same on all ranks

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["best_elbo"] = self.best_elbo

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best_elbo = checkpoint.get("best_elbo", -math.inf)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Latent codes: the mode of q of the first layer, ``[B, *positions, out_features]``."""
        x = data_of(batch)
        self.check_data(x)
        return self.stochastic_layers[0].mode(self.encode(x))

    def configure_optimizers(self) -> Optimizer:
        own = [p for layer in self.stochastic_layers for p in layer.parameters()]
        known = {id(p) for p in own}
        groups = [
            {"params": [p for p in self.parameters() if id(p) not in known], "lr": self.lr},
            {"params": own, "lr": self.lr if self.baseline_lr is None else self.baseline_lr},
        ]
        used = [group for group in groups if group["params"]]
        return build_optimizer(self.make_optimizer, used, self.lr, self._trainer)

    def configure_callbacks(self) -> list[Callback]:
        # imported late: the callback is written for this class
        from lightning_modules.callbacks.gradient_variance import GradientVarianceMonitor

        callbacks = cast(Any, self.trainer).callbacks
        monitored = any(isinstance(c, GradientVarianceMonitor) for c in callbacks)
        return [*own_noise(self.trainer), *([] if monitored else [GradientVarianceMonitor()])]


def data_of(batch: Any) -> Tensor:
    """The data x of a batch ``(x, ...)`` or x.

    Raises:
        ValueError: The batch is neither.
    """
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, Tensor):
        raise ValueError(f"needed batches x or (x, ...), got {type(x).__name__}; give the loader a collate_fn.")
    return x
