"""Several ranks: the joint mean, refusals, recomputation, and what the ranks gain in variance."""

import math
from pathlib import Path

import pytest
import torch
from joined_noise import JoinedNoise
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from logged_worker import NAMES, logged
from processes import launch, torchrun
from quiet_trainer import quiet_trainer
from scale_runs import (
    ACCUMULATED,
    ROWS,
    Joined,
    JoinedHierarchy,
    build,
    build_hierarchy,
    fit,
    joined_batches,
    state,
)
from scale_variance import KINDS, table
from torch import nn
from torch.utils.checkpoint import checkpoint

import stochastic_layers as sl
from lightning_modules import ELBO, StochasticClassifier
from lightning_modules.ranks import check_equal_batches, check_strategy, mean_over_ranks
from stochastic_layers.baselines import RunningMean
from stochastic_layers.control_variates import CostMoments, RelativeVariance


class FakeRanks:
    """torch.distributed as one rank of two sees it; the other rank's contribution is given."""

    def __init__(self, monkeypatch, other):
        for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: 2)):
            monkeypatch.setattr(torch.distributed, name, value)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(other))

        def all_gather(every, mine):
            every[0].copy_(mine)
            every[1].fill_(other)

        monkeypatch.setattr(torch.distributed, "all_gather", all_gather)


def test_gradients_of_uneven_ranks_average_to_that_of_the_joined_mean(monkeypatch):
    values = torch.arange(1.0, 6.0)
    parts = values.split((1, 4))
    losses = []
    for part, other in zip(parts, (4.0, 1.0), strict=True):
        with monkeypatch.context() as patch:
            FakeRanks(patch, other)
            losses.append(mean_over_ranks(part))
    assert float(sum(losses) / 2) == float(values.mean())
    assert float(sum(part.mean() for part in parts) / 2) != float(values.mean())  # what plain means would give


def test_a_classifier_counts_the_rows_of_uneven_ranks_alike(monkeypatch):
    model, x, y = StochasticClassifier(nn.Linear(3, 4), 4), torch.randn(5, 3), torch.arange(5) % 4
    losses = []
    for rows, other in ((slice(1), 4.0), (slice(1, 5), 1.0)):
        with monkeypatch.context() as patch:
            FakeRanks(patch, other)
            losses.append(model.training_step((x[rows], y[rows]), 0))
    torch.testing.assert_close(sum(losses) / 2, model.training_step((x, y), 0))


def test_free_bits_are_those_of_the_joined_batch(monkeypatch):
    kl = torch.tensor([[0.1, 0.1], [0.1, 0.2], [0.1, 0.9]], requires_grad=True)  # rows of two ranks, 1 and 2 of them
    objective, parts = ELBO(free_bits=0.35), kl.split((1, 2))
    terms = []
    for part, other in zip(parts, reversed(parts), strict=True):
        with monkeypatch.context() as patch:
            FakeRanks(patch, torch.cat([other.detach().sum(0), torch.tensor([float(len(other))])]))
            terms.append(objective.kl_term(part, 1.0))
    joined = kl.mean(0).clamp_min(0.35).sum()  # the definition
    torch.testing.assert_close(torch.cat(terms).mean(), joined)
    (found,), (expected,) = (torch.autograd.grad(loss, kl) for loss in (torch.cat(terms).mean(), joined))
    torch.testing.assert_close(found, expected)
    assert not torch.equal(objective.kl_term(parts[0], 1.0), terms[0])  # one rank alone has other latents below them


def test_statistics_of_a_control_variate_are_joint_from_the_first_step(monkeypatch):
    mine, other = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0]])
    energies = torch.cat([mine, other]).square()
    with monkeypatch.context() as patch:
        FakeRanks(patch, torch.tensor([16.0, 1.0]))  # the sum of the other rank's squares, and its rows
        objective = RelativeVariance()(mine, torch.zeros(2))
    torch.testing.assert_close(objective, mine.square().squeeze(-1) / energies.mean())
    costs = torch.tensor([[1.0, 2.0], [4.0, 9.0]])  # a row of each rank; their mean is 4
    sums = iter([torch.tensor([13.0, 2.0]), torch.tensor([25.0, 2.0])])  # of the other one
    moments = CostMoments(decay=0.0)
    with monkeypatch.context() as patch:
        FakeRanks(patch, 0.0)
        patch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(next(sums)))
        moments.observe(costs[:1])
    torch.testing.assert_close(moments.mean, costs.mean().view(1))
    torch.testing.assert_close(moments.std.square(), costs.var(correction=0).view(1))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_infinite_cost_of_another_rank_is_counted_on_no_rank(monkeypatch, bad):
    """Else their baselines would differ from there on."""
    running = RunningMean()
    running.update(torch.tensor([[3.0]]))
    with monkeypatch.context() as patch:
        FakeRanks(patch, torch.tensor([bad, 1.0]))
        running.update(torch.tensor([[5.0]]))
    torch.testing.assert_close(running.value, torch.tensor([3.0]))


def test_ranks_with_different_numbers_of_batches_are_refused(monkeypatch):
    check_equal_batches(3, torch.device("cpu"))  # one process: nothing to compare
    FakeRanks(monkeypatch, 3)
    check_equal_batches(3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"got \[4, 3\].*limit_train_batches=3"):
        check_equal_batches(4, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"got \[-1, 3\]"):
        check_equal_batches(math.inf, torch.device("cpu"))


def test_a_strategy_that_shards_the_model_is_refused_at_set_up():
    trainer = quiet_trainer()
    for strategy in (ModelParallelStrategy(), FSDPStrategy(accelerator=trainer.accelerator)):
        with pytest.raises(ValueError, match=f"got {type(strategy).__name__}.*Use strategy='ddp'"):
            check_strategy(strategy)
    check_strategy(trainer.strategy)
    check_strategy(DDPStrategy())


def test_half_precision_on_the_cpu_is_bfloat16_with_a_warning_that_says_so():
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        trainer = quiet_trainer(precision="16-mixed")
    assert trainer.precision == "bf16-mixed"


def joined_draws(draw, rows, seeds):
    with JoinedNoise(rows, seeds):
        return draw(sum(rows))


@pytest.mark.parametrize("rows", [(13, 13), (9, 4)])
def test_joined_noise_is_what_each_rank_draws(rows):
    def draw(size):
        first = torch.rand(3, size, 2)
        return torch.cat([first, torch.empty(3, size, 2).exponential_(), torch.bernoulli(first)])

    joined = joined_draws(draw, rows, (5, 6))
    for part, size, seed in zip(joined.split(rows, 1), rows, (5, 6), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(part, draw(size))


LAYERS = [n for n in sl.list_layers() if n != "flow"]
WITH_CODEBOOKS = ("vq", "rotation_trick", "residual_vq", "diveq")


def train_through(name, recomputed, steps=2):
    """Gradients and state of steps of a network around a layer, with the network recomputed or not."""
    layer = sl.create(name, **options(name))
    encoder, decoder = nn.Linear(4, layer.in_features), nn.Linear(layer.out_features, 5)
    x, results = torch.randn(6, 4), []

    def network(x):
        return decoder(torch.tanh(layer(encoder(x))))

    for _ in range(steps):
        with sl.capture() as samples:
            y = checkpoint(network, x, use_reentrant=False) if recomputed else network(x)
        loss = sl.surrogate((y - 1).square().sum(-1), samples).mean()
        loss.backward()
        results.append(float(loss.detach()))
    parameters = [p.grad for m in (encoder, decoder, layer) for p in m.parameters() if p.grad is not None]
    return results, parameters, [b.clone() for b in layer.buffers()]


def options(name):
    families = sl.describe(name).families
    if "categorical" in families:
        return {"latent_dim": 2, "family": "categorical", "num_categories": 4}
    return {"latent_dim": 2} | ({"num_categories": 4} if sl.families.takes_categories(families[0]) else {})


@pytest.mark.parametrize("name", LAYERS)
def test_activation_checkpointing_redraws_the_same_noise_and_learns_once(name, seed):
    torch.manual_seed(seed)
    plain = train_through(name, False)
    torch.manual_seed(seed)
    recomputed = train_through(name, True)
    assert plain[0] == recomputed[0]
    for ours, theirs in zip(plain[1] + plain[2], recomputed[1] + recomputed[2], strict=True):
        assert torch.equal(ours, theirs)


def test_a_moving_average_inside_a_checkpointed_region_is_refused():
    layer = sl.create("reinforce", latent_dim=2, baseline="moving_average")

    def region(params):
        sample = layer.sample(params)
        return sample.surrogate(sample.z.sum(-1)).exp()

    loss = checkpoint(region, torch.zeros(3, 2, requires_grad=True), use_reentrant=False).mean()
    with pytest.raises(RuntimeError, match="a running mean outside the region of activation checkpointing"):
        loss.backward()


def test_the_mean_over_simulated_ranks_has_a_variance_of_one_over_ranks():
    for kind, name in KINDS.items():
        for ranks, (own, own_error, shared, shared_error) in table(name, draws=1000).items():
            assert own_error < 0.05, "too few draws to see anything"
            assert abs(own * ranks - 1) < 5 * own_error * ranks, (kind, ranks)
            assert shared - 5 * shared_error > own, (kind, ranks)  # control: shared noise gives part of it away


@pytest.mark.ddp
def test_two_processes_under_ddp_halve_the_variance_unless_they_share_their_noise(tmp_path):
    status, output = torchrun(Path(__file__).with_name("scale_variance.py"), "ddp", tmp_path / "result.pt", timeout=300)
    assert status == 0, output[-3000:]
    for kind, (own, own_error, shared, shared_error) in torch.load(tmp_path / "result.pt", weights_only=True).items():
        assert abs(own - 0.5) < 5 * own_error < 0.2, kind
        assert shared - 5 * shared_error > 0.5, kind


@pytest.mark.ddp
def test_what_two_processes_log_in_training_is_the_mean_over_the_rows_of_uneven_batches(tmp_path):
    launch("logged_worker.py", tmp_path, timeout=200)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    models = {name: build(name, Joined, lr=0.01) for name in NAMES} | {
        "hierarchy": build_hierarchy(JoinedHierarchy, lr=0.01)
    }
    for name, model in models.items():
        alone, end = logged(model, joined_batches())
        assert [set(step) for step in alone] == [{"train/elbo", "train/kl", "train/reconstruction"}] * len(ROWS)
        (first, first_end), (second, second_end) = (rank[name] for rank in ranks)
        assert first == second
        for step, expected in zip(first, alone, strict=True):
            assert step == pytest.approx(expected, rel=1e-5), name
        for key, value in end.items():
            assert torch.equal(first_end[key], second_end[key]), (name, key)
            torch.testing.assert_close(first_end[key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.ddp
def test_two_processes_with_different_numbers_of_batches_are_both_refused():
    status, output = torchrun(Path(__file__).with_name("uneven_worker.py"), timeout=200)
    assert status == 0, output[-3000:]
    assert all(f"rank {rank}: needed the same number of training batches" in output for rank in (0, 1))


@pytest.mark.parametrize("name", ["reinforce:moving_average", "vq"])
def test_a_run_that_accumulates_gradients_resumes_exactly_at_every_optimizer_step(name, tmp_path):
    model = build(name)
    whole = fit(model, joined_batches(), checkpoints=tmp_path, **ACCUMULATED).losses
    assert list(whole) == list(range(6))  # two epochs of three batches: two optimizer steps each
    for step, batch in ((1, 2), (2, 3), (3, 5)):
        resumed = build(name)
        losses = fit(resumed, joined_batches(), resume=tmp_path / f"step={step}.ckpt", **ACCUMULATED).losses
        assert losses == {number: loss for number, loss in whole.items() if number >= batch}
        for key, value in state(model).items():
            assert torch.equal(state(resumed)[key], value), (step, key)


@pytest.mark.parametrize("name", sl.list_layers())
def test_no_parameter_is_a_scalar_which_strategies_that_shard_refuse(name):
    layer = build(name).layer
    assert all(parameter.dim() for parameter in layer.parameters())
