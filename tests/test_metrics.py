"""Metrics: closed forms, exact joining of unequal shards, and what a VAE logs by them."""

import math

import pytest
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import stochastic_layers as sl
from lightning_modules import VAE
from lightning_modules.evaluation import evaluation_loader, unpadded
from lightning_modules.metrics import (
    ActiveUnits,
    BitsPerDimension,
    CodePerplexity,
    EffectiveSampleSize,
    EvidenceLowerBound,
    ExampleMean,
    ImportanceWeightedBound,
    KLPerDimension,
)

N = 23
METRICS = {
    "mean": (ExampleMean, {}, lambda: (torch.randn(N),)),
    "elbo": (EvidenceLowerBound, {}, lambda: (100 * torch.randn(N), torch.rand(N))),
    "iwae": (ImportanceWeightedBound, {}, lambda: (50 * torch.randn(N, 7),)),
    "ess": (EffectiveSampleSize, {}, lambda: (torch.randn(N, 7),)),
    "bits": (BitsPerDimension, {"num_values": 5}, lambda: (torch.randn(N),)),
    "kl": (KLPerDimension, {"num_latents": 3}, lambda: (torch.rand(N, 3),)),
    "active": (ActiveUnits, {"num_units": 4, "threshold": 1.0}, lambda: (torch.randn(N, 4) * torch.arange(4),)),
    "codes": (CodePerplexity, {"num_codes": 6, "num_variables": 2}, lambda: (torch.randint(6, (N, 2)),)),
    "shares": (CodePerplexity, {"num_codes": 6, "num_variables": 2}, lambda: (torch.randn(N, 2, 6).softmax(-1),)),
}


def update(metric, rows):
    """Add rows [n, ...]; log-weights have their draws first."""
    transposed = isinstance(metric, (ImportanceWeightedBound, EffectiveSampleSize))
    metric.update(*(r.t() if transposed else r for r in rows))


def join(metrics):
    """One metric with the states of several, reduced as torchmetrics does over processes."""
    whole = metrics[0].clone()
    for name, reduce in whole._reductions.items():
        setattr(whole, name, reduce(torch.stack([getattr(m, name) for m in metrics])))
    whole._update_count, whole._computed = 1, None
    return whole


def vectors(metric):
    """All that a metric can say."""
    said = [metric.compute().double().reshape(-1)]
    if isinstance(metric, ActiveUnits):
        said += [metric.variances(), metric.means().flatten()]
    if isinstance(metric, CodePerplexity):
        said += [metric.frequencies().flatten(), metric.usage().reshape(1)]
    return torch.cat(said)


@pytest.mark.parametrize("name", METRICS)
def test_unequal_shards_and_batches_join_to_the_value_of_all_data_at_once(name):
    make, options, draw = METRICS[name]
    rows = draw()
    at_once = make(**options)
    update(at_once, rows)
    ranks = [make(**options) for _ in range(3)]
    for rank, (start, stop) in zip(ranks, ((0, 2), (2, 2), (2, N)), strict=True):  # the second rank has an empty batch
        for first in range(start, max(stop, start + 1), 4):
            update(rank, tuple(r[first : min(first + 4, stop)] for r in rows))
    torch.testing.assert_close(vectors(join(ranks)), vectors(at_once), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(vectors(ranks[0]), vectors(at_once))  # the shards do differ


@pytest.mark.parametrize("name", METRICS)
def test_metrics_stay_exact_in_a_model_of_half_precision(name):
    make, options, draw = METRICS[name]
    rows = draw()
    plain, half = make(**options), make(**options).to(torch.bfloat16)
    for metric in (plain, half):
        for start in range(0, N, 4):
            update(metric, tuple(r[start : start + 4] for r in rows))
    torch.testing.assert_close(vectors(half), vectors(plain), rtol=1e-12, atol=1e-14)


def test_bound_and_effective_sample_size_of_chunks_are_those_at_once_and_take_no_gradient():
    log_weights = (10 * torch.randn(30, 4)).requires_grad_()
    bound, size = ImportanceWeightedBound(), EffectiveSampleSize()
    for metric in (bound, size):
        metric.update(chunk for chunk in log_weights.split(7))
    weights = log_weights.detach().double().exp()
    torch.testing.assert_close(bound.compute(), weights.mean(0).log().mean())
    torch.testing.assert_close(size.compute(), (weights.sum(0) ** 2 / (weights**2).sum(0)).mean())
    assert not bound.compute().requires_grad
    huge = EffectiveSampleSize()
    huge.update(torch.tensor([[1e6, -1e6], [1e6, 0.0], [-1e6, -1e6]]))
    torch.testing.assert_close(huge.compute(), torch.tensor(1.5, dtype=torch.float64))


def test_importance_weighted_bound_of_a_linear_gaussian_model_is_below_the_evidence_and_rises_to_it():
    # p(z) = N(0, 1), p(x | z) = N(z, 1), q(z | x) = N(x / 2, 1), against p(x) = N(0, 2)
    x = torch.randn(2000, dtype=torch.float64)
    normal = torch.distributions.Normal

    def log_weights(draws):
        q = normal(x / 2, torch.ones_like(x))
        z = q.sample((draws,))
        return normal(0.0, 1.0).log_prob(z) + normal(z, 1.0).log_prob(x) - q.log_prob(z)

    evidence = float(normal(0.0, math.sqrt(2)).log_prob(x).mean())
    values = []
    for chunks in ([1], [10], [500, 500]):
        metric = ImportanceWeightedBound()
        metric.update(log_weights(draws) for draws in chunks)
        values.append(float(metric.compute()))
    elbo = evidence - 0.5 * (2 - 1 - math.log(2))  # KL(N(m, 1) || N(m, 1/2))
    assert values[0] == pytest.approx(elbo, abs=0.08)  # the standard error is below 0.016
    assert values[0] < values[1] < values[2] < evidence + 1e-3
    assert values[2] == pytest.approx(evidence, abs=2e-3)


def test_bits_per_dimension_of_uniform_bytes_are_eight():
    metric = BitsPerDimension(num_values=12)
    metric.update(torch.full((5,), -12 * math.log(256)))
    assert float(metric.compute()) == pytest.approx(8)


def test_kl_per_dimension_is_that_of_gaussians():
    loc, log_variance = torch.randn(9, 3), torch.randn(9, 3)
    model = VAE("gaussian", {"latent_dim": 3})
    kl = model.closed_form_kl(model.layer.distribution((loc, log_variance)))
    metric = KLPerDimension(3)
    metric.update(kl)
    expected = 0.5 * (loc**2 + log_variance.exp() - 1 - log_variance).mean(0)
    torch.testing.assert_close(metric.compute(), expected.double())


def test_variance_of_the_posterior_mean_does_not_cancel_at_a_large_mean():
    exact = torch.randn(1000, 2, dtype=torch.float64) * torch.tensor([1.0, 0.01])
    metric = ActiveUnits(2)
    for rows in (exact + 1e8).split(37):
        metric.update(rows)
    expected = (exact + 1e8 - 1e8).var(0, correction=0)
    torch.testing.assert_close(metric.variances(), expected, rtol=1e-6, atol=0)
    rows = exact + 1e8
    naive = (rows**2).mean(0) - rows.mean(0) ** 2
    assert not torch.allclose(naive, expected, rtol=0.1)  # what sums of squares would have given
    assert int(metric.compute()) == 1


def test_a_unit_of_several_coordinates_is_active_by_the_sum_of_their_variances():
    means = torch.zeros(4, 2, 3)
    means[:, 1] = 0.08 * torch.tensor([1.0, -1.0, 1.0, -1.0]).unsqueeze(1)  # variance 0.0064 each
    metric = ActiveUnits(2, unit_size=3)
    metric.update(means)
    assert int(metric.compute()) == 1
    strict = ActiveUnits(2, unit_size=3, threshold=0.0)
    strict.update(means)
    assert int(strict.compute()) == 1  # a unit that does not vary is not active whatever the threshold
    torch.testing.assert_close(metric.variances(), torch.tensor([0.0, 0.0192]).double(), rtol=1e-6, atol=1e-9)


def test_perplexity_of_codes_is_that_of_the_layer_and_soft_shares_are_averaged():
    layer = sl.create("vq", latent_dim=2, code_dim=4, num_codes=16)
    params = torch.randn(64, 8)
    layer(params)
    metric = CodePerplexity(16)
    for rows in layer.indices(params).split(10):
        metric.update(rows.unsqueeze(-1))
    torch.testing.assert_close(metric.compute(), layer.perplexity(params))
    soft = CodePerplexity(4)
    soft.update(torch.tensor([[[0.5, 0.5, 0.0, 0.0]], [[0.0, 0.5, 0.5, 0.0]]]))
    entropy = -(0.25 * math.log(0.25) * 2 + 0.5 * math.log(0.5))
    assert float(soft.compute()) == pytest.approx(math.exp(entropy))
    assert float(soft.usage()) == 0.75


def test_perplexity_is_that_of_each_variable_averaged():
    metric = CodePerplexity(8, num_variables=2)
    metric.update(torch.stack([torch.arange(4), torch.full((4,), 7)], -1))  # four codes of one, one of the other
    assert float(metric.compute()) == pytest.approx((4 + 1) / 2)
    assert metric.frequencies()[1].tolist() == [0.0] * 7 + [1.0]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ExampleMean().update(torch.zeros(2, 3)), r"one value per example, \[B\], got \[2, 3\]"),
        (lambda: ImportanceWeightedBound().update(torch.zeros(3)), r"log-weights \[K, B\], got \[3\]"),
        (lambda: ImportanceWeightedBound().update(iter(())), "at least one draw"),
        (lambda: BitsPerDimension(0), "needed num_values >= 1, got 0"),
        (lambda: KLPerDimension(3).update(torch.zeros(2, 4)), r"\[B, 3\], got \[2, 4\]"),
        (lambda: ActiveUnits(3).update(torch.zeros(2, 4)), r"needed 3 \* 1 posterior means"),
        (lambda: ActiveUnits(3, threshold=-1.0), "needed threshold >= 0"),
        (lambda: CodePerplexity(3).update(torch.tensor([[3]])), "needed codes from 0 to 2, got 3..3"),
        (lambda: CodePerplexity(3, 2).update(torch.tensor([[1]])), "needed integer codes"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_a_mean_of_no_example_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        ExampleMean().compute()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("examples", "world_size", "batch_size"), [(7, 2, 2), (7, 3, 1), (2, 5, 4), (8, 4, 3)])
def test_the_padding_of_a_distributed_sampler_is_left_out(examples, world_size, batch_size, shuffle):
    data = TensorDataset(torch.arange(examples))
    kept, padded = [], 0
    for rank in range(world_size):
        sampler = DistributedSampler(data, world_size, rank, shuffle=shuffle)
        loader = DataLoader(data, batch_size, sampler=sampler)
        for number, (x,) in enumerate(loader):
            kept += x[: unpadded(loader, number)].tolist()
            padded += len(x)
    assert sorted(kept) == list(range(examples))
    assert (padded > examples) == (examples % world_size > 0)  # there was something to leave out


@pytest.mark.parametrize("layer", ["gaussian", "vq", "gumbel_softmax", "hard_concrete"])
def test_an_evaluation_counts_the_examples_and_not_the_padding(layer):
    model = VAE(layer).eval()
    x = torch.rand(6, 1, 8, 8).round()
    params = model.encode(x).detach()
    bound, kl = model.bound(terms := model.terms(x, params)), terms.kl
    padded, plain = model.evaluation("val"), model.evaluation("test")
    padded.update(bound, kl, model.posterior(terms), params, 4)
    first = {name: value[:4] for name, value in bound.items()}
    plain.update(first, None if kl is None else kl[:4], model.layer.distribution(params[:4]), params[:4], None)
    for one, other in zip(padded.children(), plain.children(), strict=True):
        torch.testing.assert_close(one.compute(), other.compute())
        assert one.update_called
    assert padded.active_units.num_units == model.layer.latent_dim
    torch.testing.assert_close(padded.active_units.variances(), plain.active_units.variances())


@pytest.mark.parametrize("contain", [lambda v: v, lambda v: [v], lambda v: {"a": v}], ids=["bare", "list", "mapping"])
def test_the_loader_of_an_evaluation_is_found_in_a_container_and_after_a_fit(contain):
    class Watched(VAE):
        def on_validation_epoch_end(self):
            self.seen = evaluation_loader(self.trainer)

        def on_test_epoch_end(self):
            self.seen = evaluation_loader(self.trainer)

    train, during, after = (DataLoader(torch.rand(n, 1, 8, 8).round(), 2) for n in (2, 3, 5))
    model, trainer = Watched("gaussian", {"latent_dim": 2}), quiet_trainer(max_steps=1, num_sanity_val_steps=0)
    trainer.fit(model, train, contain(during))
    assert model.seen is during
    trainer.validate(model, contain(after), verbose=False)
    assert model.seen is after
    trainer.test(model, contain(during), verbose=False)
    assert model.seen is during


def test_no_draws_of_the_importance_weighted_bound_are_no_metric():
    model = VAE("gaussian", iwae_samples={"val": 0, "test": 1})
    assert model.evaluation("val").iwae is None and model.evaluation("test").iwae is not None


def test_other_loaders_have_no_padding():
    data = TensorDataset(torch.arange(5))
    assert unpadded(DataLoader(data, 2), 0) is None
    assert unpadded([data], 1) is None
