"""The optimizer: one for all, at the learning rates of the model, in a form that can be clipped."""

from functools import partial

import pytest
import torch
from image_runs import loader, trainer
from torch import nn

from lightning_modules import VAE, StochasticClassifier


def test_the_optimizer_is_one_and_gives_the_layers_parameters_their_own_rate():
    model = VAE("reinforce", {"baseline": "learned"}, lr=1e-3, baseline_lr=1e-2)
    optimizer = model.configure_optimizers()
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-2]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    custom = VAE("gaussian", optimizer=partial(torch.optim.SGD, momentum=0.9), lr=0.1).configure_optimizers()
    assert isinstance(custom, torch.optim.SGD) and [g["lr"] for g in custom.param_groups] == [0.1]


@pytest.mark.parametrize("build", [partial(VAE, "gaussian"), partial(StochasticClassifier, nn.Linear(3, 2), 2)])
def test_a_learning_rate_that_would_not_be_used_is_refused(build):
    assert build(lr=0.5).configure_optimizers().param_groups[0]["lr"] == 0.5
    rates = (torch.optim.SGD, partial(torch.optim.AdamW, lr=0.5), partial(torch.optim.LBFGS, max_iter=3))
    for optimizer in rates:
        assert build(lr=0.5, optimizer=optimizer).configure_optimizers().param_groups[0]["lr"] == 0.5
    for optimizer in (partial(torch.optim.SGD, lr=0.1), lambda groups: torch.optim.Adam(groups, lr=0.1)):
        with pytest.raises(
            ValueError, match=r"needed one learning rate, got lr = 0.5 of the model and 0.1 of (SGD|Adam)"
        ):
            build(lr=0.5, optimizer=optimizer).configure_optimizers()
    with pytest.raises(ValueError, match="needed a function of parameter groups as optimizer"):
        build(optimizer="adam")


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_algorithm": "value"}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_default_optimizer_is_fused_where_gradients_can_be_clipped_all_the_same(precision, options, tmp_path):
    run = trainer(tmp_path, max_steps=2, precision=precision, **options)
    run.fit(VAE("reinforce", {"latent_dim": 4}), loader(), loader())
    assert run.optimizers[0].defaults["fused"] == (precision == "32-true" or "gradient_clip_val" not in options)
