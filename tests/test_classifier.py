"""The classifier: sampling layers and Bayesian weights inside a network, and what evaluation averages."""

import itertools
import math

import pytest
import torch
from quiet_trainer import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stochastic_layers as sl
from lightning_modules import ReproducibleNoise, StochasticClassifier
from lightning_modules.data import Digits
from stochastic_layers import bayesian

LOO = {"num_samples": 4, "baseline": "leave_one_out"}


class NoisyLinear(nn.Linear):
    """A Bayesian layer in miniature: a normal posterior of fixed scale around the weights, a standard normal prior."""

    scale = 0.1

    def forward(self, x):
        return nn.functional.linear(x, self.weight + self.scale * torch.randn_like(self.weight), self.bias)

    def kl_divergence(self):
        log_ratio = math.log(self.scale)
        return (0.5 * (self.scale**2 + self.weight.square() - 1) - log_ratio).sum()


def trainer(tmp_path, **options):
    defaults = dict(max_epochs=3, log_every_n_steps=5, default_root_dir=tmp_path)
    return quiet_trainer(**(defaults | options))


def network(name="reinforce", **options):
    layer = sl.create(name, latent_dim=24, **options)
    first = nn.Linear(64, layer.in_features)
    with torch.no_grad():
        first.weight.mul_(4)  # draws that tell of the input from the start, so that few epochs will do
    return nn.Sequential(nn.Flatten(), first, layer, nn.Linear(layer.out_features, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.mark.parametrize(
    ("name", "options"), [("reinforce", LOO), ("straight_through", {}), ("gaussian", {"num_samples": 2})]
)
def test_a_network_with_a_sampling_layer_learns_the_digits(name, options, tmp_path):
    model = StochasticClassifier(network(name, **options), 10, lr=1e-2, eval_draws=4)
    run = trainer(tmp_path, max_epochs=6)
    run.fit(model, Digits(batch_size=32))
    assert {"train/loss", "train/accuracy", "train/expected_log_likelihood"} <= set(run.callback_metrics)
    assert "train/kl" not in run.callback_metrics
    run.test(model, Digits(), verbose=False)
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    names = ("loss", "accuracy", "calibration_error", "expected_log_likelihood", "predictive_log_likelihood")
    assert set(metrics) == {f"test/{n}" for n in names}
    assert metrics["test/accuracy"] > 0.3  # chance is 0.1, with a standard error of 0.016
    assert metrics["test/loss"] == pytest.approx(-metrics["test/expected_log_likelihood"])
    assert metrics["test/predictive_log_likelihood"] > metrics["test/expected_log_likelihood"]
    assert 0 <= metrics["test/calibration_error"] < 0.5


def test_gradient_of_the_loss_is_that_of_the_expected_cross_entropy():
    torch.manual_seed(1)
    layer = sl.create("reinforce", latent_dim=2, num_samples=2, baseline="leave_one_out")
    model = StochasticClassifier(nn.Sequential(nn.Linear(3, 2), layer, nn.Linear(2, 3)), 3).double()
    x, y = torch.randn(1, 3, dtype=torch.float64), torch.tensor([1])
    weight = model.network[0].weight
    q = layer.distribution(model.network[0](x))
    z = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=torch.float64).unsqueeze(1)
    exact = -(layer.family.log_prob(q, z).exp() * model.log_prob(model.network[2](z), y)).sum()
    (exact,) = torch.autograd.grad(exact, weight)
    batch = (x.expand(500, 3), y.expand(500))
    rows = torch.stack([torch.autograd.grad(model.training_step(batch, 0), weight)[0] for _ in range(400)])
    error = rows.std(0) / 20
    assert 8 * float(error.norm()) < 0.1 * float(exact.norm())
    assert float(((rows.mean(0) - exact) / error).abs().max()) < 5


def test_kl_is_divided_by_the_size_of_the_data_set_and_counted_once():
    layer = NoisyLinear(8, 8)
    model = StochasticClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), layer, layer, nn.Linear(8, 10)), 10, dataset_size=50
    )
    batch = (torch.rand(6, 1, 8, 8), torch.arange(6))
    torch.manual_seed(0)
    loss = model.training_step(batch, 0)
    torch.manual_seed(0)
    cost = -model.log_prob(model.network(batch[0]), batch[1]).mean()
    torch.testing.assert_close(model.kl_divergence(), layer.kl_divergence())
    torch.testing.assert_close(loss, cost + layer.kl_divergence() / 50)


def test_inner_parts_of_a_bayesian_layer_are_not_counted_again():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = NoisyLinear(64, 10)

        def forward(self, x):
            return self.inner(x.flatten(1))

        def kl_divergence(self):
            return self.inner.kl_divergence()

    model = StochasticClassifier(Wrapped(), 10, dataset_size=10)
    torch.testing.assert_close(model.kl_divergence(), model.network.inner.kl_divergence())


def test_a_bayesian_network_learns_and_reports_its_kl(tmp_path):
    net = nn.Sequential(nn.Flatten(), NoisyLinear(64, 32), nn.ReLU(), NoisyLinear(32, 10))
    model = StochasticClassifier(net, 10, dataset_size=1257, lr=1e-2, eval_draws=8)
    run = trainer(tmp_path, max_epochs=8)
    run.fit(model, Digits(batch_size=32))
    assert float(run.callback_metrics["train/kl"]) > 0
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    assert metrics["val/accuracy"] > 0.6
    expected = -metrics["val/expected_log_likelihood"] + float(model.kl_divergence().detach()) / 1257
    assert metrics["val/loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "cls", [bayesian.ReparameterizationLinear, bayesian.LocalReparameterizationLinear, bayesian.FlipoutLinear]
)
def test_bayesian_layers_of_the_package_fit(cls, tmp_path):
    net = nn.Sequential(nn.Flatten(), cls(64, 16), nn.ReLU(), cls(16, 10))
    model = StochasticClassifier(net, 10, dataset_size=1257, eval_draws=4)
    torch.testing.assert_close(model.kl_divergence(), bayesian.kl_divergence(net))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, Digits())
    values = {k: float(v) for k, v in run.callback_metrics.items()}
    assert values["val/predictive_log_likelihood"] > values["val/expected_log_likelihood"]
    assert model.draws(torch.rand(3, 1, 8, 8)).std(0).min() > 0  # weights are drawn in every pass


def test_layers_and_weights_may_both_be_random(tmp_path):
    net = nn.Sequential(nn.Flatten(), NoisyLinear(64, 8), sl.create("reinforce", latent_dim=8, **LOO), nn.Linear(8, 10))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(StochasticClassifier(net, 10, dataset_size=1257), Digits())
    assert math.isfinite(float(run.callback_metrics["val/loss"]))


def test_averaged_probabilities_tend_to_the_exact_mixture():
    torch.manual_seed(2)
    layer = sl.create("straight_through", latent_dim=2)
    model = StochasticClassifier(nn.Sequential(nn.Linear(3, 2), layer, nn.Linear(2, 4)), 4, eval_draws=3000).eval()
    x = torch.randn(2, 3)
    z = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2))).unsqueeze(1).expand(4, 2, 2)
    q = layer.distribution(model.network[0](x))
    exact = (layer.family.log_prob(q, z).exp().unsqueeze(-1) * model.network[2](z).softmax(-1)).sum(0)
    torch.testing.assert_close(model.predict_probs(x), exact, rtol=0, atol=5 * 0.5 / math.sqrt(3000))
    torch.testing.assert_close(model(x).sum(-1), torch.ones(2))


def test_evaluation_does_not_disturb_the_noise_of_training(tmp_path):
    def weights(**options):
        torch.manual_seed(0)
        model = StochasticClassifier(network(**LOO), 10)
        run = trainer(tmp_path, max_epochs=2, callbacks=[ReproducibleNoise(seed=1)], **options)
        run.fit(model, Digits())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(), weights(limit_val_batches=0))


def test_reproducible_noise_is_the_default(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(StochasticClassifier(network(**LOO), 10), Digits())
    assert sum(isinstance(c, ReproducibleNoise) for c in run.callbacks) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes >= 2"),
        ({"eval_draws": 0}, "eval_draws >= 1"),
        ({"dataset_size": 0}, "dataset_size >= 1"),
        ({"network": NoisyLinear(3, 10)}, "needed dataset_size with Bayesian layers"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StochasticClassifier(**({"network": nn.Linear(64, 10), "num_classes": 10} | options))


X, Y = torch.rand(6, 1, 8, 8), torch.arange(6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"needed batches \(x, y\) of two tensors, got Tensor"),
        ((X,), r"needed batches \(x, y\) of two tensors, got 1 of Tensor"),
        ((X, list(Y)), r"needed batches \(x, y\) of two tensors, got 2 of Tensor, list"),
        ((X, torch.eye(10)[Y]), r"needed one label for each of 6 examples, \[6\], got \[6, 10\].*y.argmax\(-1\)"),
        ((X, Y[:, None]), r"got \[6, 1\].*y.squeeze\(-1\)"),
        ((X, Y[:5]), r"needed one label for each of 6 examples, \[6\], got \[5\]"),
        ((X, Y.float()), r"needed labels in torch.int64, got torch.float32; convert them, y.long\(\)"),
        ((X, Y.byte()), "needed labels in torch.int64, got torch.uint8"),
        ((X, Y + 5), "needed labels from 0 to 9, got 5 to 10; number the classes from 0"),
        ((X, Y - 1), "needed labels from 0 to 9, got -1 to 4"),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
@pytest.mark.parametrize("use", ["fit", "validate", "test"])
def test_other_batches_than_data_and_labels_are_refused(use, batch, message, tmp_path):
    model, run = StochasticClassifier(network(), 10), trainer(tmp_path, limit_val_batches=int(use != "fit"))
    with pytest.raises(ValueError, match=message):
        loader = DataLoader([batch], batch_size=None)
        run.fit(model, loader, loader) if use == "fit" else getattr(run, use)(model, loader)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, at a graph break
def test_a_compiled_classifier_trains_as_it_does_uncompiled(tmp_path):
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = StochasticClassifier(network("straight_through"), 10)
        run = trainer(tmp_path, max_steps=1, log_every_n_steps=1, limit_val_batches=0)
        run.fit(torch.compile(model, backend="eager") if compiled else model, Digits())
        found.append([*model.parameters(), run.callback_metrics["train/accuracy"]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_clipped_in_mixed_precision(tmp_path):
    run = trainer(tmp_path, max_steps=1, precision="bf16-mixed", gradient_clip_val=0.1)
    run.fit(StochasticClassifier(network(**LOO), 10), Digits())
    assert run.global_step == 1


def test_logits_of_another_shape_are_refused():
    model = StochasticClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), 10)
    with pytest.raises(ValueError, match=r"needed logits \[..., 5, 10\] of the network, got \[5, 9\]"):
        model.training_step((torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.long)), 0)


@pytest.mark.parametrize("name", ["enumeration", "rebar"])
def test_the_training_accuracy_weighs_points_as_the_layer_does(name, tmp_path):
    layer = sl.create(name, latent_dim=1, family="bernoulli")
    to_label = nn.Linear(1, 2)
    with torch.no_grad():  # one outcome says class 1, the other one, and all points between them, class 0
        to_label.weight.copy_(torch.tensor([[0.0], [8.0]]))
        to_label.bias.copy_(torch.tensor([7.9, 0.0]))
    constant = nn.Linear(3, 1)
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.fill_(1.5)
    model = StochasticClassifier(nn.Sequential(constant, layer, to_label), 2, lr=0.0)
    x, y = torch.randn(2000, 3), torch.ones(2000, dtype=torch.long)
    run, loader = trainer(tmp_path, max_epochs=1, log_every_n_steps=1), DataLoader(TensorDataset(x, y), batch_size=2000)
    run.fit(model, loader, loader)
    chance = torch.sigmoid(torch.tensor(1.5)).item()
    error = 0.0 if name == "enumeration" else (chance * (1 - chance) / 2000) ** 0.5
    assert abs(float(run.callback_metrics["train/accuracy"]) - chance) < 5 * error + 1e-6


def test_a_network_in_evaluation_mode_is_not_trained_without_the_gradient_of_its_draws(tmp_path):
    model = StochasticClassifier(network(**LOO), num_classes=10).eval()
    with pytest.raises(ValueError, match=r"needed a network in training mode, got eval\(\)"):
        trainer(tmp_path).fit(model, Digits())
