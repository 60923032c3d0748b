"""Gradients of whole models against exact ones: statistics over repeated batches, with stated power."""

import math

import torch


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def groups_of(model):
    """The parameters of q and of p, without those that a layer trains for itself."""
    groups = {}
    own = {id(p) for layer in model.stochastic_layers for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            groups.setdefault("q" if name.startswith(("encoder", "upwards")) else "p", []).append(parameter)
    return groups


def exact_gradients(model, value):
    groups = groups_of(model)
    gradients = torch.autograd.grad(value, [p for group in groups.values() for p in group])
    result, start = {}, 0
    for name, group in groups.items():
        result[name] = flat(gradients[start : start + len(group)])
        start += len(group)
    return result


def check_gradients(model, x, exact, *, replicates=1000, visible_bias=0.05, max_batches=4000, only=None):
    """Assert that the mean gradient of ``model.loss`` is the exact one, in every group of parameters.

    The batches repeat one example. They are drawn until a bias of ``visible_bias`` along the gradient would stand 8
    standard errors out in every group; then no coordinate, and no projection, may be off by more than 5.
    """
    groups = {name: group for name, group in groups_of(model).items() if only is None or name in only}
    draws = {name: [] for name in groups}
    batch = x.expand(replicates, *x.shape)
    needed = 60
    while len(next(iter(draws.values()))) < needed:
        loss = model.loss(model.terms(batch)).mean()
        gradients = torch.autograd.grad(loss, [p for group in groups.values() for p in group])
        start = 0
        for name, group in groups.items():
            draws[name].append(flat(gradients[start : start + len(group)]))
            start += len(group)
        if len(draws[name]) == 60:  # enough to see how many are needed
            needed = max(
                60,
                *(
                    math.ceil(60 * (8 * _projection(torch.stack(d), exact[n])[1] / visible_bias) ** 2 * 1.2)
                    for n, d in draws.items()
                ),
            )
            assert needed <= max_batches, f"a bias of {visible_bias:g} would need {needed} batches"
    for name, rows in draws.items():
        rows = torch.stack(rows)
        error = rows.std(0) / math.sqrt(len(rows)) + 1e-12 * (1 + exact[name].abs())
        z = ((rows.mean(0) - exact[name]) / error).abs().max()
        value, spread = _projection(rows, exact[name])
        z = max(float(z), abs(value - 1) / (spread + 1e-12))
        difference = float((rows.mean(0) - exact[name]).norm() / exact[name].norm())
        assert z < 5, f"{name}: {z:.1f} standard errors off after {len(rows)} batches, {difference:.3g} of its norm"


def _projection(rows, exact):
    along = rows @ exact / exact.square().sum()
    return float(along.mean()), float(along.std() / math.sqrt(len(along)))
