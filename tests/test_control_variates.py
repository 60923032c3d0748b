"""Layers with control variates: unbiased, with what each part of a model receives, and the variance they reach."""

import pytest
import torch
from control_variate_problems import BITS, CATEGORIES, Model, build, gradients, total_variance, train

import stochastic_layers as sl
from stochastic_layers.testing import PolynomialCost, check_mean, exact_value, measure

SMALL = {"hidden_features": 8}
BOTH = {**SMALL, "control_variate": "both"}
UNSCALED = {"normalize": False, "baseline": {"name": "learned", "hidden_features": 8}}
CASES = [
    ("leave_one_out", BITS),
    ("leave_one_out", {**CATEGORIES, "num_samples": 3}),
    ("leave_one_out", {"latent_dim": 2, "family": "gaussian", "num_samples": 4}),
    ("nvil", {**BITS, **UNSCALED}),
    ("nvil", {**CATEGORIES, **UNSCALED, "num_samples": 2}),
    ("muprop", BITS),
    ("muprop", {**CATEGORIES, "num_samples": 2}),
    ("rebar", BITS),
    ("rebar", CATEGORIES),
    ("rebar", {**BITS, "num_samples": 2, "temperature": 0.2}),
    ("relax", {**BITS, **SMALL}),
    ("relax", {**CATEGORIES, **SMALL, "num_samples": 2}),
    ("relax", {**BITS, **BOTH}),
    ("relax", {**CATEGORIES, **BOTH, "num_samples": 2}),
    ("double_cv", BITS),
    ("double_cv", {**CATEGORIES, "num_samples": 3}),
    ("rodeo", {**BITS, **SMALL}),
    ("rodeo", {**BITS, **SMALL, "num_samples": 3}),
    ("rodeo", {**BITS, **SMALL, "taylor": False}),
]
DISCRETE = [case for case in CASES if case[1].get("family") != "gaussian"]
MAIN = [
    ("nvil", {**BITS, **UNSCALED}),
    *(case for case in CASES if case[1] in (BITS, {**BITS, **SMALL}, {**BITS, **BOTH})),
]
LEARNED = [case for case in CASES if case[0] in ("rebar", "relax", "rodeo")]


def disturb(layer):
    """Control variates that are neither at their start nor any good: an unbiased layer stays so."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("kind", ["quadratic", "asymmetric"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradient_of_the_encoder_is_exact_in_the_mean(name, options, kind):
    layer, params = build(name, options)
    check_mean(disturb(layer), params, PolynomialCost(kind, layer.out_features), max_draws=400_000)


@pytest.mark.parametrize(("name", "options"), MAIN, ids=str)
def test_gradient_is_exact_in_the_mean_after_the_control_variates_have_learned(name, options):
    layer, params = build(name, options)
    cost = PolynomialCost("cubic", layer.out_features)
    train(layer, params, cost, steps=150, copies=8)
    check_mean(layer, params, cost, max_draws=400_000)


@pytest.mark.parametrize(("name", "options"), MAIN, ids=str)
def test_gradient_of_the_decoder_and_value_are_exact_in_the_mean(name, options):
    layer, params = build(name, options)
    cost = PolynomialCost("asymmetric", layer.out_features)
    check_mean(disturb(layer), params, cost, of="decoder")
    check_mean(layer, params, cost, of="value")


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_value_of_the_surrogate_is_the_weighted_cost(name, options):
    layer, params = build(name, options)
    sample = layer.sample(params.requires_grad_())
    cost = PolynomialCost("cubic", layer.out_features)(sample.z)
    assert torch.equal(sample.surrogate(cost), (sample.weights.view(-1, 1) * cost).sum(0))


@pytest.mark.parametrize("name", ["leave_one_out", "double_cv", "rodeo"])
def test_constant_cost_gives_no_gradient(name):
    layer, params = build(name, BITS)
    for _ in range(3):
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        sample.surrogate(PolynomialCost("constant", 3)(sample.z)).sum().backward()
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize(("name", "options"), MAIN, ids=str)
def test_a_black_box_cost_is_unbiased_too(name, options):
    layer, params = build(name, options)
    cost = PolynomialCost("quadratic", layer.out_features)

    class BlackBox(PolynomialCost):
        def forward(self, z):
            return super().forward(z.detach())

    box = BlackBox("quadratic", layer.out_features)
    box.load_state_dict(cost.state_dict())
    check_mean(disturb(layer), params, box, max_draws=400_000)


@pytest.mark.parametrize(("name", "options"), [*MAIN, ("rebar", CATEGORIES), ("double_cv", CATEGORIES)], ids=str)
def test_summed_batch_dimensions_are_one_vector_of_latents(name, options):
    """Two positions whose cost is summed are unbiased, although each control variate serves both."""
    layer, params = build(name, options)
    cost = PolynomialCost("linear", 2 * layer.out_features)
    leaf = params.expand(60_000, 2, -1).clone().requires_grad_()
    sample = disturb(layer).sample(leaf)
    value = cost(sample.z.flatten(-2))  # [S, draws]
    assert sample.surrogate(value).shape == (60_000,)
    (draws,) = torch.autograd.grad(sample.surrogate(value).sum(), leaf)
    exact = _exact_of_two_positions(layer, params, cost)
    error = draws.std(0) / len(draws) ** 0.5
    assert float(error.norm() / exact.norm()) < 0.05
    assert float(((draws.mean(0) - exact) / (error + 1e-12)).abs().max()) < 5


def _exact_of_two_positions(layer, params, cost):
    options = {"latent_dim": 2 * layer.latent_dim, "family": layer.family.name}
    if layer.num_categories is not None:
        options["num_categories"] = layer.num_categories
    leaf = params.clone().requires_grad_()
    value = exact_value(sl.create("reinforce", **options).double(), leaf.flatten().unsqueeze(0), cost)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return gradient


@pytest.mark.parametrize(
    ("name", "options", "batch"),
    [(*case, batch) for case in CASES for batch in ((), (0,), (2, 3), (2, 0))],
    ids=str,
)
def test_any_number_of_batch_dimensions(name, options, batch):
    layer, _ = build(name, options)
    leaf = torch.randn(*batch, layer.in_features, dtype=torch.float64, requires_grad=True)
    cost = PolynomialCost("asymmetric", layer.out_features)
    for _ in range(2):
        sample = layer.sample(leaf)
        loss = sample.surrogate(cost(sample.z))
        assert loss.shape == batch
        loss.sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())
    assert all(bool(torch.isfinite(t).all()) for t in layer.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), DISCRETE, ids=str)
def test_extreme_logits_and_temperatures_stay_finite(name, options, dtype):
    options = {**options, "temperature": 1e-3} if name in ("rebar", "relax") else options
    layer = sl.create(name, **options).to(dtype)
    cost = PolynomialCost("asymmetric", layer.out_features)
    signs = torch.tensor([1.0, -1.0] * layer.in_features)[: layer.in_features]
    for scale in (1e4, 1.0, 0.0):
        leaf = (scale * signs).to(dtype).expand(4, -1).clone().requires_grad_()
        sample = layer.sample(leaf)
        layer.zero_grad()
        sample.surrogate(cost(sample.z).to(dtype)).mean().backward()
        assert bool(torch.isfinite(leaf.grad).all())
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in layer.parameters())


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


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_nothing_moves_while_gradients_are_off_or_in_evaluation(name, options):
    layer, params = build(name, options)
    cost = PolynomialCost("cubic", layer.out_features)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        sample = layer.sample(params)
        sample.surrogate(cost(sample.z))
    sample = layer.eval().sample(params)
    sample.surrogate(cost(sample.z))
    assert sample.z.shape[0] == layer.num_samples
    if layer.family.discrete:
        assert bool(((sample.z == 0) | (sample.z == 1)).all())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_control_variates_order_the_variance_on_a_cubic():
    """Four bits, a cubic cost, after 200 steps of tuning; each inequality stands out of the error of the figures."""
    figures = {}
    for name, options in {
        "reinforce": {"baseline": "none"},
        "leave_one_out": {"num_samples": 4},
        "muprop": {},
        "rebar": {},
        "relax": SMALL,
        "double_cv": {"decay": 0.95},
        "double_cv 4": {"num_samples": 4, "decay": 0.95},
        "rodeo": {"decay": 0.95, **SMALL},
        "rodeo 4": {"num_samples": 4, "decay": 0.95, **SMALL},
    }.items():
        layer, params = build(name.split()[0], {"latent_dim": 4, **options}, batch=1)
        cost = PolynomialCost("cubic", 4)
        figures[name] = total_variance(train(layer, params, cost, steps=200, copies=16), params, cost)
    layer, params = build("leave_one_out", {"latent_dim": 4}, batch=1)
    figures["leave_one_out 2"] = total_variance(layer, params, cost)
    print({name: round(value, 1) for name, value in figures.items()})
    for worse, better in [
        ("reinforce", "muprop"),
        ("reinforce", "rebar"),
        ("reinforce", "relax"),
        ("leave_one_out 2", "double_cv"),
        ("double_cv", "rodeo"),
        ("leave_one_out", "double_cv 4"),
        ("double_cv 4", "rodeo 4"),
    ]:
        assert figures[better] < 0.9 * figures[worse], (better, worse, figures)


def test_muprop_is_exact_for_a_linear_cost():
    for options in (BITS, CATEGORIES):
        layer, params = build("muprop", options)
        moments = measure(layer, params, PolynomialCost("linear", layer.out_features), num_draws=50)
        assert float((moments.mean - moments.exact).abs().max()) < 1e-12
        assert float(moments.standard_error.max()) < 1e-8


def test_muprop_without_its_correction_is_caught():
    from stochastic_layers import control_variates

    class Uncorrected(sl.MuProp):
        def draw(self, params, context):
            sample = super().draw(params, context)
            right = sample.credit

            def credit(cost):
                kept = control_variates.jacobian_product
                control_variates.jacobian_product = lambda family, point, vector: torch.zeros_like(vector)
                try:
                    return right(cost)
                finally:
                    control_variates.jacobian_product = kept

            return self._sample(sample.q, sample.z, weights=sample.weights, credit=credit)

    _, params = build("muprop", BITS)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(Uncorrected(3).double(), params, PolynomialCost("quadratic", 3))


def test_leave_one_out_is_reinforce_with_that_baseline():
    first, params = build("leave_one_out", {**BITS, "num_samples": 3})
    second, _ = build("reinforce", {**BITS, "num_samples": 3, "baseline": "leave_one_out"})
    found = []
    for layer in (first, second):
        torch.manual_seed(0)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        sample.surrogate(sample.z.pow(3).sum(-1)).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_nvil_divides_by_the_running_deviation_from_before_the_step():
    """The same noise with and without normalisation: the gradients differ by exactly that factor."""
    cost = PolynomialCost("cubic", 3)
    found = {}
    for normalize in (True, False):
        torch.manual_seed(5)
        layer, params = build("nvil", {**BITS, "normalize": normalize, "baseline": "none"})
        for step in range(4):
            leaf = params.clone().requires_grad_()
            spread = float(layer.moments.std)
            sample = layer.sample(leaf)
            sample.surrogate(1000 * cost(sample.z)).sum().backward()
            found[normalize, step] = leaf.grad, spread
    assert found[True, 0][1] == 1.0
    assert found[True, 3][1] > 100
    for step in range(4):
        (divided, spread), (plain, _) = found[True, step], found[False, step]
        assert torch.allclose(divided * max(1.0, spread), plain, rtol=1e-6)


def test_nvil_does_not_amplify_small_costs():
    layer, params = build("nvil", {**BITS, "baseline": "none"})
    train(layer, params, lambda z: 1e-3 * z.sum(-1), steps=50)
    assert float(layer.moments.std) < 1e-2
    found = []
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    for normalize in (True, False):
        layer.normalize = normalize
        layer.load_state_dict(state)
        torch.manual_seed(0)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        sample.surrogate(1e-3 * sample.z.sum(-1)).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_nvil_moments_are_those_of_the_cost():
    layer, params = build("nvil", {**BITS, "baseline": "none", "decay": 0.9})
    cost = PolynomialCost("cubic", 3)
    train(layer, params, lambda z: 500.0 + cost(z), steps=200, copies=200)
    sample = layer.eval().sample(params.expand(50_000, 2, 3))
    value = (500.0 + cost(sample.z)).detach()
    assert float(layer.moments.mean) == pytest.approx(float(value.mean()), rel=0.01)
    assert float(layer.moments.std) == pytest.approx(float(value.std()), rel=0.1)


def test_descriptions_say_what_is_evaluated():
    evaluations = {n: sl.describe(n).evaluations for n in ("nvil", "muprop", "rebar", "relax", "double_cv", "rodeo")}
    assert evaluations == {
        "nvil": "num_samples",
        "muprop": "num_samples + 1",
        "rebar": "3 * num_samples",
        "relax": "num_samples",
        "double_cv": "num_samples",
        "rodeo": "num_samples",
    }
    for name, formula in evaluations.items():
        for num_samples in (2, 3):
            layer, params = build(name, {**BITS, "num_samples": num_samples})
            assert layer.sample(params).z.shape[0] == eval(formula, {"num_samples": num_samples})
    assert "nvil" not in sl.list_layers(unbiased=True)


@pytest.mark.parametrize("name", ["leave_one_out", "double_cv", "rodeo"])
def test_a_single_draw_is_refused(name):
    with pytest.raises(ValueError, match="num_samples >= 2"):
        sl.create(name, latent_dim=3, num_samples=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nvil", {"decay": 1.0}),
        ("double_cv", {"decay": -0.1}),
        ("rodeo", {"family": "categorical"}),
        ("rebar", {"temperature": 0.0}),
        ("relax", {"temperature": -1.0}),
        ("relax", {"family": "gaussian"}),
        ("muprop", {"family": "gaussian"}),
    ],
    ids=str,
)
def test_bad_options_are_refused(name, options):
    with pytest.raises(ValueError, match=r"needed|supports"):
        sl.create(name, latent_dim=3, **options)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="torch is too old for it")
@pytest.mark.parametrize(("name", "options"), [*MAIN, ("rebar", CATEGORIES), ("double_cv", CATEGORIES)], ids=str)
def test_compiles_to_one_graph_with_the_gradients_of_eager_mode(name, options):
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


def _on_one_rank(rank, port, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
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
        results[rank, name] = (
            {n: p.grad.tolist() for n, p in model.named_parameters()},
            {n: b.tolist() for n, b in layer.named_buffers()},
        )
    dist.destroy_process_group()


class Wrapped(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.loss(x).mean()


@pytest.mark.ddp
def test_ranks_agree_on_gradients_and_statistics():
    """Two processes with different data and noise: everything that is learned or remembered is the same on both."""
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_on_one_rank, (port, results), nprocs=2)
        found = dict(results)
    names = {name for _, name in found}
    assert len(names) == 4
    for name in names:
        assert found[0, name] == found[1, name], name
        gradients_of_rank, buffers = found[0, name]
        assert all(any(v != 0 for v in torch.tensor(g).flatten().tolist()) for g in gradients_of_rank.values()) or (
            name == "rodeo"  # whose network has a zero last layer at the start
        )
        assert any(torch.tensor(b).abs().sum() > 0 for b in buffers.values())


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("rebar", "rebar"), ("muprop", "double_cv"), ("double_cv", "relax"), ("rodeo", "muprop"), ("relax", "rodeo")],
)
def test_stacked_layers_are_unbiased(outer, inner):
    """Bits that set the logits of further bits; the slope of the inner surrogate is an estimate, and that is enough."""
    first, params = build(outer, {"latent_dim": 2, **(SMALL if outer in ("relax", "rodeo") else {})}, batch=1)
    second, _ = build(inner, {"latent_dim": 2, **(SMALL if inner in ("relax", "rodeo") else {})})
    weight = torch.tensor([[1.2, -0.7], [0.4, 0.9]], dtype=torch.float64)
    cost = PolynomialCost("quadratic", 4)

    def joint_cost(upper, lower):
        return cost(torch.cat([upper.expand(*lower.shape[:-1], 2), lower], -1))

    leaf, matrix = params.clone().requires_grad_(), weight.clone().requires_grad_()
    value = exact_value(first, leaf, lambda z: exact_value(second, z @ matrix, lambda y: joint_cost(z, y)))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), (leaf, matrix))])

    draws, total, squares = 30_000, 0.0, 0.0
    for _ in range(3):  # the second and third pass have coefficients
        leaf = params.expand(draws, -1).clone().requires_grad_()
        matrices = weight.expand(draws, 2, 2).clone().requires_grad_()
        with sl.capture() as samples:
            upper = first(leaf)
            lower = second(torch.einsum("...bi,bij->...bj", upper, matrices))
        loss = sl.surrogate(joint_cost(upper, lower), samples)
        found = torch.cat([g.flatten(1) for g in torch.autograd.grad(loss.sum(), (leaf, matrices))], -1)
        total, squares = total + found.sum(0), squares + found.square().sum(0)
    mean = total / (3 * draws)
    error = ((squares / (3 * draws) - mean.square()) / (3 * draws)).sqrt()
    assert float(error.norm() / exact.norm()) < 0.05
    assert float(((mean - exact) / error).abs().max()) < 5
