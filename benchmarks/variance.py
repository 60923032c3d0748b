"""Whose gradient is best for its time? Variance x time of all estimators on one state; decides which one to train with.

For each family a small VAE is trained on digits and then kept as it is. On a batch of test data every estimator of the
family is held to it: the total variance of its gradient at the layer's params (of one example, over redrawn noise), the
bias against the exact gradient, where all outcomes can be enumerated, or a long unbiased average, and the time of one
gradient of params and decoder. An estimator that is averaged over n draws has 1/n of the variance for n times the time,
so that their product does not depend on the number of draws: it is the variance that a second buys. Of a biased
estimator the bias stays, however long the average is; it is given beside, where as many draws as were made can tell it
from noise. ::

    python -m benchmarks.variance

Learned baselines and control variates, and running means, get 200 steps on the frozen state first, as they would be
trained along. In each of nine rounds every estimator is measured once, its variance and its time; products and ratios
are taken round by round.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

import stochastic_layers as sl
from benchmarks.measure import Row, accelerator, arguments, interleave, summary, write
from lightning_modules import VAE
from lightning_modules.data import Digits
from lightning_modules.scoring import layer_statistics
from stochastic_layers import StochasticLayer
from stochastic_layers.diagnostics import GradientStatistics, Reference

QUESTION = (
    "Total variance of the gradient times the seconds that one takes, of every estimator on one frozen VAE of each "
    "family; lower is better."
)
ROUNDS, BATCH, EPOCHS, WARM_UP = 9, 16, 15, 200
DRAWS_PER_SECOND = 50  # of each round, for each second of --seconds


@dataclass(frozen=True)
class State:
    """What is trained, by which layer, and with which layer all others are compared.

    Attributes:
        trained_with: Layer of the model; the reference of the ratios.
        options: Its sizes.
        num_samples: Its draws.
    """

    trained_with: str
    options: dict[str, Any]
    num_samples: int


STATES = {
    "bernoulli": State("leave_one_out", {"latent_dim": 8}, 2),
    "categorical": State("leave_one_out", {"latent_dim": 3, "num_categories": 6}, 2),
    "gaussian": State("gaussian", {"latent_dim": 8}, 1),
}


def trained(family: str, device: str) -> tuple[VAE, Tensor]:
    """A VAE after some epochs on digits, and test data ``[B, 1, 8, 8]``."""
    state = STATES[family]
    L.seed_everything(0, verbose=False)
    options = {**state.options, "family": family, "num_samples": state.num_samples}
    networks = {"name": "mlp", "hidden_features": [64]}
    model = VAE(state.trained_with, options, encoder=networks, decoder=networks)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator=accelerator(device),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = Digits(batch_size=100)
    trainer.fit(model, datamodule=data)
    x, _ = next(iter(data.test_dataloader()))
    return model.to(device).train(), x[:BATCH].to(device)


def gradient(model: VAE, layer: StochasticLayer, x: Tensor) -> Callable[[], None]:
    """One gradient of the expected reconstruction cost, of the layer's params and the decoder."""
    with torch.no_grad():
        params = model.encode(x)
    params = params.clone().requires_grad_()
    context = model.context(layer, x, params.detach())
    tensors = [params, *model.decoder.parameters(), *layer.parameters()]

    def work() -> None:
        for tensor in tensors:
            tensor.grad = None
        sample = layer.sample(params, context)
        sample.surrogate(-model.log_likelihood(sample.z, x)).mean().backward()

    return work


def warm_up(work: Callable[[], None], layer: StochasticLayer) -> None:
    """Train what the layer itself learns, and let its running means settle."""
    learned = list(layer.parameters())
    optimizer = torch.optim.Adam(learned, lr=1e-3) if learned else None
    for _ in range(WARM_UP if learned or list(layer.buffers()) else 0):
        work()
        if optimizer is not None:
            optimizer.step()


def measure(family: str, options: Any, draws: int) -> tuple[list[Row], dict[str, float], dict[str, str]]:
    """The rows of one family, what was found of bias, and the layers that were not measured."""
    model, x = trained(family, options.device)
    layers: dict[str, StochasticLayer] = {}
    unavailable: dict[str, str] = {}
    for name in sl.list_layers(family=family):
        sizes = STATES[family].options
        layers[name] = sl.create(name, family=family, **sizes).to(options.device)
    works = {name: gradient(model, layer, x) for name, layer in layers.items()}
    for name, layer in layers.items():
        warm_up(works[name], layer)
    times = interleave(works, seconds=0, device=options.device, min_rounds=ROUNDS)
    found: dict[str, list[GradientStatistics]] = {name: [] for name in layers}
    reference: Reference | str = "auto"
    for number in range(ROUNDS):
        torch.manual_seed(number)  # the redraws of a measurement leave the random state as it was
        statistics, refused = layer_statistics(
            model, x, layers, num_draws=draws, reference=reference, reference_draws=20 * draws
        )
        unavailable |= {f"{name} ({family})": reason for name, reason in refused.items()}
        for name, (_, measured) in statistics.items():
            found[name].append(measured)
            reference = measured.reference or reference
    rows: list[Row] = []
    alone: list[Row] = []
    findings: dict[str, float] = {}
    base = STATES[family].trained_with
    products = {
        name: [one.total_variance * seconds for one, seconds in zip(measured, times[name], strict=True)]
        for name, measured in found.items()
        if measured
    }
    for name, values in products.items():
        ratios = [a / b for a, b in zip(values, products[base], strict=True)]
        rows.append(Row(family, name, "variance x s", *summary(values), ROUNDS, base, *summary(ratios)))
        for unit, factor in (("variance", [one.total_variance for one in found[name]]), ("s", times[name])):
            alone.append(Row(f"{family}, {unit} alone", name, unit, *summary(factor), ROUNDS))
        bias = relative_bias(found[name])
        if bias:
            findings[f"relative bias of {name} ({family})"] = round(bias, 4)
        print(f"{family:12s} {name:28s} {rows[-1].ratio:9.4f} x {base}, bias {bias:.4f}", flush=True)
    rows.sort(key=lambda row: row.ratio or 0.0)
    rows += sorted(alone, key=lambda row: row.unit)
    return rows, findings, unavailable


def relative_bias(rounds: list[GradientStatistics]) -> float:
    """Norm of the bias over that of the reference; 0 where its square is less than five standard errors."""
    moments = rounds[0].moments
    assert moments is not None
    mean = torch.stack([one.mean for one in rounds])
    joined = GradientStatistics(
        mean.mean(0),
        torch.stack([one.variance for one in rounds]).mean(0),
        sum(one.num_draws for one in rounds),
        rounds[0].reference,
        replace(moments, groups=mean),
    )
    norm, error = joined.relative_bias
    return norm if norm**2 > 5 * ((norm + error) ** 2 - norm**2) else 0.0


def main() -> None:
    """Measure and write ``variance.json``."""
    options = arguments(QUESTION, seconds=4)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    rows: list[Row] = []
    findings: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for family in STATES:
        new, more, missing = measure(family, options, max(16, round(DRAWS_PER_SECOND * options.seconds)))
        rows, findings, unavailable = rows + new, findings | more, unavailable | missing
    path = write(
        "variance",
        QUESTION,
        rows,
        device=options.device,
        findings=findings,
        unavailable=unavailable,
        folder=options.folder,
    )
    print(path)


if __name__ == "__main__":
    main()
