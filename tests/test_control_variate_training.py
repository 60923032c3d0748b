"""What each part of a model with control variates receives: in eager mode, in one graph, and on several ranks."""

import pytest
import torch
from control_variate_problems import LEARNED, MAIN, SMALL, UNSCALED, Model, disturb, gradients, train
from processes import free_port, spawn_two
from small_problems import BITS, CATEGORIES, build

from stochastic_layers import noise
from stochastic_layers.testing import PolynomialCost


@pytest.mark.parametrize(("name", "options"), LEARNED, ids=str)
def test_each_part_of_a_model_receives_its_own_gradient_and_no_other(name, options):
    """Freezing the control variates, or multiplying their gradient, changes no other gradient by a bit."""
    layer, _ = build(name, options)
    model = Model(disturb(layer))
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(3):  # coefficients that are not zero
        model.loss(x).mean().backward()
    state = {k: v.clone() for k, v in layer.state_dict().items()}

    def run():
        torch.manual_seed(7)
        layer.load_state_dict(state)
        return gradients(model, model.loss(x).mean())

    tuned = run()
    layer.requires_grad_(False)
    torch.manual_seed(7)
    layer.load_state_dict(state)
    others = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = torch.autograd.grad(model.loss(x).mean(), list(others.values()))
    for parameter, gradient in zip(others, frozen, strict=True):
        assert torch.allclose(tuned[parameter], gradient, rtol=1e-12, atol=1e-14), parameter
        assert float(gradient.abs().sum()) > 0
    own = [n for n in tuned if n.startswith("layer.")]
    assert own and all(float(tuned[n].abs().sum()) > 0 for n in own)


@pytest.mark.parametrize(("name", "options"), LEARNED, ids=str)
def test_control_variates_receive_the_gradient_of_the_squared_norm(name, options):
    """By finite differences: perturb one parameter, keep the noise, and measure the estimator's squared norm."""
    layer, params = build(name, options)
    disturb(layer)
    cost = PolynomialCost("asymmetric", layer.out_features)
    train(layer, params, cost, steps=3, copies=4)  # running means that are not at their start
    state = {k: v.clone() for k, v in layer.state_dict().items()}

    def run():
        torch.manual_seed(11)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        loss = sample.surrogate(cost(sample.z)).mean()
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        return (gradient * len(params)).square().sum(-1).mean(), loss

    scale = float(layer.variance.value)
    _, loss = run()
    parameters = dict(layer.named_parameters())
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    for parameter in parameters:
        step = 1e-5 * torch.randn_like(state[parameter])
        energies = []
        for sign in (1, -1):
            layer.load_state_dict({**state, parameter: state[parameter] + sign * step})
            energies.append(float(run()[0]))
        expected = (energies[0] - energies[1]) / 2 / scale
        assert float((found[parameter] * step).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-12), parameter


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="torch is too old for it")
@pytest.mark.parametrize(("name", "options"), [*MAIN, ("rebar", CATEGORIES), ("double_cv", CATEGORIES)], ids=str)
def test_compiles_to_one_graph_with_the_gradients_of_eager_mode(name, options, monkeypatch):
    monkeypatch.setattr(noise, "fast_integers", noise.traceable_integers)  # so that both draw the same numbers
    layer, params = build(name, options)
    cost = PolynomialCost("asymmetric", layer.out_features)

    def loss(leaf):
        sample = layer.sample(leaf)
        return sample.surrogate(cost(sample.z)).mean()

    torch._dynamo.reset()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    found = []
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for each in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
            layer.load_state_dict(state)
            for _ in range(2):  # the second step has running means
                torch.manual_seed(1)
                leaf = params.clone().requires_grad_()
                layer.zero_grad()
                cost.zero_grad()
                each(leaf).backward()
            own = [torch.zeros(1) if p.grad is None else p.grad for p in layer.parameters()]
            found.append([leaf.grad, cost.theta.grad, *own, *(b.clone() for b in layer.buffers())])
    assert all(torch.allclose(*pair) for pair in zip(*found, strict=True))


def _on_one_rank(rank, port, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    results = {}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    cases = [LEARNED[0], ("double_cv", BITS), ("nvil", {**BITS, **UNSCALED}), ("rodeo", {**BITS, **SMALL})]
    for name, options in cases:
        torch.manual_seed(0)
        layer, _ = build(name, options)
        model = Model(layer)
        wrapped = torch.nn.parallel.DistributedDataParallel(Wrapped(model), broadcast_buffers=False)
        torch.manual_seed(rank)  # other data and other noise
        for _ in range(3):
            wrapped.zero_grad()
            wrapped(torch.randn(4, 5, dtype=torch.float64)).backward()
        results[name] = (
            {n: p.grad.tolist() for n, p in model.named_parameters()},
            {n: b.tolist() for n, b in layer.named_buffers()},
        )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Wrapped(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.loss(x).mean()


@pytest.mark.ddp
def test_ranks_agree_on_gradients_and_statistics(tmp_path):
    """Two processes with different data and noise: everything that is learned or remembered is the same on both."""
    spawn_two(_on_one_rank, free_port(), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == 4
    for name, (gradients_of_rank, buffers) in first.items():
        assert (gradients_of_rank, buffers) == second[name], name
        assert all(any(v != 0 for v in torch.tensor(g).flatten().tolist()) for g in gradients_of_rank.values()) or (
            name == "rodeo"  # whose network has a zero last layer at the start
        )
        assert any(torch.tensor(b).abs().sum() > 0 for b in buffers.values())
