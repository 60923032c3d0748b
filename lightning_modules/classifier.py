"""A classifier with random parts: sampling layers inside the network, Bayesian weights, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_modules.build import build_optimizer, optimizer_function
from lightning_modules.due import log_interval, step_is_due
from lightning_modules.evaluation import evaluation_loader, unpadded
from lightning_modules.metrics import ExampleMean
from lightning_modules.noise import own_noise
from lightning_modules.ranks import check_equal_batches, check_strategy, mean_over_ranks
from lightning_modules.untrusted import WeightsOnly
from stochastic_layers import Sample, StochasticLayer, capture, surrogate
from stochastic_layers.options import check_positive

__all__ = ["StochasticClassifier"]

MEANS = ("loss", "expected_log_likelihood", "predictive_log_likelihood")  # measured in evaluation


class StochasticClassifier(WeightsOnly):
    r"""Trains a network with random parts on cross-entropy: sampling layers by their own estimators, Bayesian weights.

    .. math:: \text{loss} = E[-\log p(y \mid x, \text{noise})] + KL / N

    The expectation is over the draws of every layer called in the network (:func:`~stochastic_layers.capture`) and over
    random weights; the gradient is that of :func:`~stochastic_layers.surrogate`, so that discrete layers train too. KL
    is the sum of ``kl_divergence()`` over the outermost modules that have one (Bayesian layers), and N the number of
    training examples: the loss is then the negative ELBO per example.

    In evaluation the network runs ``eval_draws`` times in ``eval()`` mode. Logged for ``val`` and ``test`` (nats per
    example):

    - ``<stage>/expected_log_likelihood``: :math:`E \log p(y \mid x, \text{noise})`, the mean over the draws;
    - ``<stage>/predictive_log_likelihood``: :math:`\log E \, p(y \mid x, \text{noise})`, at least that;
    - ``<stage>/loss``: KL / N minus the expected log-likelihood;
    - ``<stage>/accuracy`` and ``<stage>/calibration_error`` (expected, 15 bins) of the averaged probabilities.

    In training ``train/loss``, ``train/accuracy``, ``train/expected_log_likelihood`` and, with Bayesian layers,
    ``train/kl`` (of the whole data set) are logged at every ``log_every_n_steps``.

    Args:
        network: Data ``[B, ...]`` -> logits ``[B, num_classes]``, or ``[S, B, num_classes]`` where its sampling layers
            draw S points.
        num_classes: Number of classes.
        dataset_size: Number N of training examples, by which the KL is divided; needed with Bayesian layers only.
        eval_draws: Number of passes that are averaged in evaluation.
        lr: Learning rate.
        optimizer: Function of parameter groups that returns an optimizer; by default fused Adam. Its learning rate is
            ``lr``.

    Raises:
        ValueError: A number is out of range, or ``dataset_size`` is missing beside Bayesian layers.

    Example:
        >>> import torch, stochastic_layers as sl
        >>> from lightning_modules import StochasticClassifier
        >>> layer = sl.create("reinforce", latent_dim=16, num_samples=4, baseline="leave_one_out")
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), layer, torch.nn.Linear(16, 10))
        >>> model = StochasticClassifier(network, num_classes=10, eval_draws=8)
        >>> model.predict_probs(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        *,
        dataset_size: int | None = None,
        eval_draws: int = 16,
        lr: float = 1e-3,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"needed num_classes >= 2, got {num_classes}.")
        if eval_draws < 1:
            raise ValueError(f"needed eval_draws >= 1, got {eval_draws}.")
        if dataset_size is not None and dataset_size < 1:
            raise ValueError(f"needed dataset_size >= 1, got {dataset_size}; it is the number of training examples.")
        self.save_hyperparameters(
            {"num_classes": num_classes, "dataset_size": dataset_size, "eval_draws": eval_draws, "lr": lr}
        )
        self.network = network
        if dataset_size is None and self.kl_divergence() is not None:
            raise ValueError(
                "needed dataset_size with Bayesian layers, got None; pass the number of training examples, because "
                "their KL is counted once for the whole data set."
            )
        self.num_classes = num_classes
        self.dataset_size = dataset_size
        self.eval_draws = eval_draws
        self.lr = check_positive("lr", lr, or_zero=True)
        self.make_optimizer = optimizer_function(optimizer)
        self.accuracies = nn.ModuleDict(
            {f"{s}_stage": MulticlassAccuracy(num_classes, average="micro") for s in ("val", "test")}
        )
        self.calibrations = nn.ModuleDict(
            {f"{s}_stage": MulticlassCalibrationError(num_classes, n_bins=15) for s in ("val", "test")}
        )
        self.means = nn.ModuleDict(
            {f"{s}_stage": nn.ModuleDict({name: ExampleMean() for name in MEANS}) for s in ("val", "test")}
        )

    def forward(self, x: Tensor) -> Tensor:
        """The averaged probabilities: see :meth:`predict_probs`."""
        return self.predict_probs(x)

    def kl_divergence(self) -> Tensor | None:
        """KL of all Bayesian layers in nats, ``None`` where there is none."""
        terms = [module.kl_divergence() for module in _outermost(self.network)]
        return torch.stack(terms).sum() if terms else None

    def _kl_per_example(self) -> Tensor | float:
        kl = self.kl_divergence()
        return 0.0 if kl is None or self.dataset_size is None else kl / self.dataset_size

    def log_prob(self, logits: Tensor, y: Tensor) -> Tensor:
        """log p(y) ``[..., B]`` of logits ``[..., B, num_classes]`` and labels ``[B]``."""
        if logits.shape[-2:] != (len(y), self.num_classes):
            raise ValueError(
                f"needed logits [..., {len(y)}, {self.num_classes}] of the network, got {list(logits.shape)}; its last "
                "layer has num_classes outputs, one row per example."
            )
        log_probs = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
        return log_probs.gather(-1, y.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    def check_data(self, batch: Any) -> None:
        """Refuse a batch that is not ``(x, y)`` with x ``[B, ...]`` and y ``[B]``, integers from 0.

        Raises:
            ValueError: It is no such pair, or a label is of no class.
        """
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(isinstance(part, Tensor) for part in batch):
            raise ValueError(
                f"needed batches (x, y) of two tensors, got {_kinds(batch)}; give the loader a collate_fn."
            )
        x, y = batch
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"needed one label for each of {len(x)} examples, [{len(x)}], got {list(y.shape)}; make "
                "labels of one-hot rows by y.argmax(-1), and of a column by y.squeeze(-1)."
            )
        if y.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"needed labels in torch.int64, got {y.dtype}; convert them, y.long().")
        low, high = (int(bound) for bound in y.aminmax())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"needed labels from 0 to {self.num_classes - 1}, got {low} to {high}; number the classes from 0, or "
                "build the model with more num_classes."
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 0 and batch_idx == 0:
            self.check_data(batch)
        x, y = batch
        with capture() as samples:
            logits = self.network(x)
        cost = -self.log_prob(logits, y)
        expected = _expectation(cost, samples)
        loss = mean_over_ranks(expected) + self._kl_per_example()
        if self._trainer is not None and step_is_due(self.trainer, log_interval(self.trainer)):
            self._log_training(loss, expected, logits, y, samples)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # Lightning's log inspects its caller: not traceable
    @torch.no_grad()
    def _log_training(self, loss: Tensor, expected: Tensor, logits: Tensor, y: Tensor, samples: list[Sample]) -> None:
        # by the weights of the draws: some layers evaluate auxiliary points as well, or every outcome
        correct = _expectation((logits.argmax(-1) == y).to(expected.dtype), samples)
        means = {"accuracy": mean_over_ranks(correct), "expected_log_likelihood": mean_over_ranks(-expected)}
        values = {"loss": loss, **means}
        kl = self.kl_divergence()
        if kl is not None:
            values["kl"] = kl
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(y), sync_dist=True)

    def draws(self, x: Tensor) -> Tensor:
        """Logits of ``eval_draws`` passes, ``[draws, B, num_classes]``; a pass with S points gives S of them."""
        passes = []
        for _ in range(self.eval_draws):
            logits = self.network(x)
            passes.append(logits.reshape(-1, *logits.shape[-2:]))
        return torch.cat(passes)

    @torch.no_grad()
    def predict_probs(self, x: Tensor) -> Tensor:
        """Probabilities of the classes, averaged over the draws: ``[B, num_classes]``."""
        return self.draws(x).softmax(-1).mean(0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Averaged probabilities ``[B, num_classes]``."""
        return self.predict_probs(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int) -> None:
        """Update and log the metrics of a stage by the examples that are no padding."""
        self.check_data(batch)
        x, y = batch
        count = unpadded(evaluation_loader(self.trainer), batch_idx)
        logits = self.draws(x)
        log_prob = self.log_prob(logits, y)  # [draws, B]
        expected = log_prob.mean(0)
        values = {
            "loss": self._kl_per_example() - expected,
            "expected_log_likelihood": expected,
            "predictive_log_likelihood": log_prob.logsumexp(0) - math.log(len(log_prob)),
        }
        probs = logits.softmax(-1).mean(0)
        for name, metrics in (("accuracy", self.accuracies), ("calibration_error", self.calibrations)):
            metric = cast(Metric, metrics[f"{stage}_stage"])
            if count != 0:  # these metrics do not take empty batches
                metric.update(probs[:count], y[:count])
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=len(y))
        for name, value in values.items():
            metric = cast(Metric, cast(nn.ModuleDict, self.means[f"{stage}_stage"])[name])
            metric.update(value[:count])
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "loss")

    def configure_optimizers(self) -> Optimizer:
        groups = [{"params": list(self.network.parameters()), "lr": self.lr}]
        return build_optimizer(self.make_optimizer, groups, self.lr, self._trainer)

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer.strategy)
        # Lightning would convert after it has loaded a checkpoint, and so round one in double precision
        self.trainer.precision_plugin.convert_module(self)

    def on_fit_start(self) -> None:
        if not self.network.training and any(isinstance(m, StochasticLayer) for m in self.network.modules()):
            raise ValueError(
                "needed a network in training mode, got eval(), in which the draws of its layers carry no gradient; "
                "call model.train()."
            )

    def on_train_start(self) -> None:
        check_equal_batches(self.trainer.num_training_batches, self.device)

    def configure_callbacks(self) -> list[Callback]:
        return own_noise(self.trainer)


def _kinds(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{len(batch)} of {', '.join(type(part).__name__ for part in batch)}"
    return type(batch).__name__


def _expectation(value: Tensor, samples: list[Sample]) -> Tensor:
    """The expectation ``[B]`` over the draws of all layers of a value ``[..., B]``; as a cost, with its gradient."""
    return surrogate(value, samples) if samples else value


def _outermost(module: nn.Module) -> Iterator[Any]:
    """The modules with a ``kl_divergence()`` that are in no other such module, each once."""
    seen: set[int] = set()
    pending = [module]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if callable(getattr(current, "kl_divergence", None)):
            yield current
        else:
            pending.extend(current.children())
