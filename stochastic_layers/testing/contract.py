"""Checks of the contract: construction, shapes, precision, value, state. Each returns what it found, or raises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch
from torch import nn

from stochastic_layers.registry import NEEDS, describe
from stochastic_layers.testing.exact import COSTS
from stochastic_layers.testing.subject import NotApplicable, Subject, close, step

__all__ = [
    "batch_shapes",
    "capability_record",
    "construction",
    "copies_and_state",
    "devices",
    "evaluations",
    "expect",
    "features",
    "mixed_precision",
    "non_contiguous_params",
    "precision",
    "refuses",
    "reported_value",
    "weights",
]

BATCHES = ((), (1,), (0,), (5,), (2, 3))


def expect(condition: object, message: str) -> None:
    """Raise :class:`AssertionError` unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def refuses(call: Callable[[], object], what: str) -> str:
    """The message of the ValueError that the call must raise."""
    try:
        call()
    except ValueError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__} instead of a ValueError: {error}") from error
    raise AssertionError(f"{what} was accepted; needed a ValueError")


def capability_record(subject: Subject) -> str:
    """The class states its capabilities, of the right types."""
    cls = subject.cls
    expect(cls.families and all(isinstance(f, str) for f in cls.families), f"families is {cls.families!r}")
    stated = isinstance(cls.unbiased, bool) or str(cls.unbiased).startswith("when ")
    expect(stated, f"unbiased is {cls.unbiased!r}; needed True, False or a sentence 'when ...'")
    expect(isinstance(cls.needs, tuple) and set(cls.needs) <= set(NEEDS), f"needs is {cls.needs!r}; subset of {NEEDS}")
    expect(isinstance(cls.exact_draws, bool), f"exact_draws is {cls.exact_draws!r}; needed a bool")
    expect(isinstance(cls.evaluations, (int, str)), f"evaluations is {cls.evaluations!r}; needed a number or a formula")
    if subject.by_name is not None:
        record = describe(subject.by_name)
        expect(record.summary, "the class has no docstring, whose first line is the summary")
    return f"unbiased: {cls.unbiased}; needs: {', '.join(cls.needs) or 'nothing'}"


def construction(subject: Subject) -> str:
    """``latent_dim`` is enough (with ``num_categories`` where there are any); bad sizes and families are refused."""
    if subject.template is not None:
        raise NotApplicable("a layer object was given; pass its class or name to test its construction")
    for bad in (0, -1, 2.5, None):
        refuses(lambda bad=bad: subject.build(latent_dim=bad), f"latent_dim={bad!r}")  # type: ignore[misc]
    refuses(lambda: subject.build(family="no such family"), "an unknown family")
    return f"latent_dim={subject.options['latent_dim']}"


def features(subject: Subject) -> str:
    """``in_features`` and ``out_features`` are those of the family."""
    layer = subject.build()
    latents, categories = layer.latent_dim, layer.num_categories or 0
    known = {
        "bernoulli": (latents, latents),
        "categorical": (latents * categories, latents * categories),
        "gaussian": (2 * latents, latents),
    }
    got = (layer.in_features, layer.out_features)
    expect(min(got) >= 1, f"(in_features, out_features) is {got}")
    needed = known.get(subject.family, got)
    expect(got == needed, f"(in_features, out_features) is {got}, needed {needed} for {subject.family!r}")
    return f"{got[0]} -> {got[1]}"


def batch_shapes(subject: Subject) -> str:
    """z, weights, q, log q, loss, mode and forward for any number of batch dimensions, none and empty among them."""
    for batch in BATCHES:
        run = subject.step(subject.params(*batch))
        sample, out = run.sample, subject.build().out_features
        points = sample.z.shape[0]
        expect(list(sample.z.shape) == [points, *batch, out], f"z is {list(sample.z.shape)} for a batch {batch}")
        expect(list(sample.q.batch_shape) == list(batch), f"q.batch_shape is {list(sample.q.batch_shape)} for {batch}")
        expect(list(sample.log_prob.shape) == [points, *batch], f"log_prob is {list(sample.log_prob.shape)}")
        expect(
            list(sample.weights.shape) in ([points], [points, *batch]),
            f"weights are {list(sample.weights.shape)}, needed [{points}] or {[points, *batch]}",
        )
        expect(list(run.loss.shape) == list(batch), f"surrogate() is {list(run.loss.shape)} for a batch {batch}")
        layer = subject.build().eval()
        for training in (False, True):
            layer.train(training)
            with torch.no_grad():
                z = layer(subject.params(*batch))
            allowed = [list(batch)] if z.dim() == len(batch) + 1 else [[z.shape[0], *batch]]
            expect(list(z.shape[:-1]) in allowed and z.shape[-1] == out, f"forward gave {list(z.shape)} for {batch}")
        mode = layer.mode(subject.params(*batch))
        expect(list(mode.shape) == [*batch, out], f"mode() is {list(mode.shape)} for a batch {batch}")
    return "batches " + ", ".join(str(list(batch)) for batch in BATCHES)


def precision(subject: Subject) -> str:
    """z has the dtype of params, log q and weights are float32 at least; the layer itself may be in bfloat16 too."""
    for dtype, inner in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)):
        layer = subject.build(torch.float64 if dtype == torch.float64 else torch.float32)
        run = step(layer, subject.params(4, dtype=dtype), subject.cost().to(inner))
        got = {"z": run.sample.z.dtype, "gradient": run.encoder.dtype}
        expect(set(got.values()) == {dtype}, f"{dtype} params gave {got}")
        got = {"log_prob": run.sample.log_prob.dtype, "weights": run.sample.weights.dtype}
        expect(set(got.values()) == {inner}, f"{dtype} params gave {got}, needed {inner}")
        expect(torch.isfinite(run.encoder).all(), f"{dtype} params gave a gradient that is not finite")
    layer = subject.build(torch.float32).to(torch.bfloat16)  # as the Trainer's bf16-true does
    for _ in range(2):  # the second step reads what the first has left in running statistics
        run = step(layer, subject.params(4, dtype=torch.bfloat16), subject.cost().float())
        expect(run.sample.z.dtype == torch.bfloat16, f"a layer in bfloat16 gave z in {run.sample.z.dtype}")
        expect(torch.isfinite(run.encoder).all(), "a layer in bfloat16 gave a gradient that is not finite")
    return "float32, float64, bfloat16"


def mixed_precision(subject: Subject) -> str:
    """Under bfloat16 autocast: z is bfloat16, log q float32, and loss and gradients finite."""
    layer = subject.build(torch.float32)
    encoder, decoder = nn.Linear(7, layer.in_features), nn.Linear(layer.out_features, 5)
    with torch.autocast("cpu", torch.bfloat16):
        params = encoder(torch.randn(4, 7))
        sample = layer.sample(params)
        cost = decoder(sample.z).square().sum(-1)
        loss = sample.surrogate(cost)
        log_prob = sample.log_prob
    torch.autograd.backward(loss.mean())
    expect(sample.z.dtype == params.dtype, f"z is {sample.z.dtype}, needed {params.dtype} as the params")
    expect(log_prob.dtype == torch.float32, f"log_prob is {log_prob.dtype}, needed float32")
    expect(torch.isfinite(loss).all() and torch.isfinite(log_prob).all(), "loss or log_prob is not finite")
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        grad = module.weight.grad
        expect(grad is not None and torch.isfinite(grad).all(), f"the gradient of the {name} is missing or not finite")
    return "bfloat16"


def devices(subject: Subject) -> str:
    """The layer can be built on the meta device, and draws on CUDA where there is one."""
    meta = _on_meta(subject)
    if not torch.cuda.is_available():
        return f"cpu{meta}"
    layer, cost = subject.build().cuda(), subject.cost().cuda()
    run = step(layer, subject.params(4).cuda(), cost)
    for what, tensor in (("z", run.sample.z), ("weights", run.sample.weights), ("loss", run.loss)):
        expect(tensor.is_cuda, f"{what} is on {tensor.device} for params on CUDA")
    expect(torch.isfinite(run.encoder).all(), "the gradient on CUDA is not finite")
    expect(layer.eval().sample(subject.params(4).cuda()).z.is_cuda, "evaluation draws are not on CUDA")
    return f"cpu{meta}, cuda"


def _on_meta(subject: Subject) -> str:
    if subject.template is not None:
        return ""
    try:
        with torch.device("meta"):
            found = {name: list(value.shape) for name, value in subject.build().state_dict().items()}
    except NotImplementedError:  # a package that the layer uses computes at construction what has no meta kernel
        return " (not meta: torch has no kernel for what its construction computes)"
    expected = {name: list(value.shape) for name, value in subject.build().state_dict().items()}
    expect(found == expected, f"the state on the meta device is {found}")
    return ", meta"


def non_contiguous_params(subject: Subject) -> str:
    """Strides do not matter: the same draws and gradients as for a contiguous copy."""
    contiguous = subject.params(3, 4)
    for strided in (
        contiguous.transpose(0, 1).contiguous().transpose(0, 1),
        contiguous.flip(-1).repeat_interleave(2, -1)[..., ::2].flip(-1),
        contiguous[:1, :1].expand(3, 4, -1),
    ):
        a = step(subject.build(), strided.contiguous(), subject.cost())
        b = step(subject.build(), strided, subject.cost())
        expect(close(a.sample.z.detach(), b.sample.z.detach()), "z depends on the strides of params")
        expect(close(a.encoder, b.encoder), "the gradient depends on the strides of params")
    return "transposed, sliced, expanded"


def reported_value(subject: Subject) -> str:
    """``surrogate(cost)`` equals ``(weights * cost).sum(0)``, with and without gradients."""
    for kind in COSTS:
        run = subject.step(kind=kind, shift=0.5)
        shaped = run.sample.weights.view(*run.sample.weights.shape, *[1] * (2 - run.sample.weights.dim()))
        value = (shaped * run.cost).sum(0).detach()
        expect(close(run.loss.detach(), value), f"surrogate() of the {kind} cost is not (weights * cost).sum(0)")
    with torch.no_grad():
        sample = subject.build().sample(subject.params(4))
        loss = sample.surrogate(subject.cost()(sample.z))
    expect(torch.isfinite(loss).all() and not loss.requires_grad, "surrogate() does not work under no_grad()")
    return "all costs"


def weights(subject: Subject) -> str:
    """The weights sum to 1 over the points."""
    for training in (True, False):
        sample = subject.build().train(training).sample(subject.params(4))
        total = sample.weights.detach().sum(0)
        where = "train()" if training else "eval()"
        expect(close(total, torch.ones_like(total)), f"the weights sum to {total.flatten()[0]:.6g} in {where}, not 1")
    return f"{sample.weights.shape[0]} points in eval()"


def evaluations(subject: Subject) -> str:
    """The number of points of a training step is the stated one."""
    layer = subject.build()
    stated = layer.evaluations
    points = layer.sample(subject.params(4)).z.shape[0]
    if isinstance(stated, str):
        known = {"min": min, "max": max}
        try:
            code = compile(stated, "evaluations", "eval")
        except SyntaxError:
            raise NotApplicable(f"stated in words ({stated}); {points} were counted") from None
        unknown = [name for name in code.co_names if name not in known and not hasattr(layer, name)]
        if unknown:
            raise NotApplicable(f"{stated!r} uses {unknown[0]!r}, which the layer lacks; {points} were counted")
        scope = {name: known[name] if name in known else getattr(layer, name) for name in code.co_names}
        number = eval(code, {"__builtins__": {}}, scope)
    else:
        number = stated
    expect(points == number, f"z has {points} points, evaluations = {stated!r} says {number}")
    return f"{points} = {stated}"


def copies_and_state(subject: Subject) -> str:
    """After a training step, a deep copy, a pickled copy and a restored state_dict go on as the layer itself."""
    layer, params, cost = subject.build(), subject.params(4), subject.cost()
    step(layer, params, cost, seed=1)  # running statistics are no longer those of the start
    restored = subject.build()
    restored.load_state_dict(layer.state_dict())
    copies = {"a restored state_dict": restored, "a deep copy": copy.deepcopy(layer)}
    if subject.importable:
        copies["a pickled copy"] = pickle.loads(pickle.dumps(layer))
    reference = step(layer, params, cost, seed=2)
    for what, twin in copies.items():
        run = step(twin, params, cost, seed=2)
        expect(close(run.sample.z.detach(), reference.sample.z.detach()), f"{what} draws something else")
        expect(close(run.encoder, reference.encoder), f"{what} gives another gradient: some state is not in buffers")
    return ", ".join(copies) + ("" if subject.importable else " (not pickled: its class cannot be imported)")
