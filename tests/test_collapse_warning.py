"""The warning of a collapsed posterior: for runs that collapse, not for healthy ones, in time and once."""

import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from image_runs import trainer

from lightning_modules import VAE, CollapseWarning
from lightning_modules.data import Digits


def warned(layer, options, objective, tmp_path, **callback):
    L.seed_everything(0, verbose=False)
    model = VAE(layer, options, objective=objective, lr=3e-3)
    watch = CollapseWarning(**({"after_steps": 80, "patience": 2} | callback))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, max_epochs=14, log_every_n_steps=50, callbacks=[watch])
        run.fit(model, Digits(binarization="dynamic"))
    return [str(w.message) for w in caught if "collapse" in str(w.message)], run


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("gaussian", {"latent_dim": 8}),
        pytest.param("straight_through", {"latent_dim": 16}, marks=SLOW),
        pytest.param("gumbel_softmax", {"latent_dim": 8, "num_categories": 4}, marks=SLOW),
        pytest.param("vq", {"latent_dim": 4, "code_dim": 4, "num_codes": 16}, marks=SLOW),
    ],
)
def test_a_healthy_run_is_not_warned_of_collapse(layer, options, tmp_path):
    messages, run = warned(layer, options, "elbo", tmp_path)
    assert messages == []
    assert run.callback_metrics["val/active_units"] >= 3


@pytest.mark.parametrize(
    ("layer", "options"),
    [("gaussian", {"latent_dim": 8}), pytest.param("straight_through", {"latent_dim": 16}, marks=SLOW)],
)
def test_a_collapsed_run_is_warned_of_once_with_what_to_try(layer, options, tmp_path):
    (message,), run = warned(layer, options, {"name": "elbo", "beta": 50.0}, tmp_path)
    assert run.callback_metrics["val/active_units"] == 0
    assert f"0 of {options['latent_dim']} latent units" in message
    assert "kl_warmup_steps" in message and "free_bits" in message and "a beta below 50" in message


def test_collapse_counts_validations_in_a_row_after_the_grace_and_the_warmup():
    def warnings_at(active, *, objective="elbo", stage="fit", **options):
        model, watch, steps = VAE("gaussian", {"latent_dim": 20}, objective=objective), CollapseWarning(**options), []
        for number, count in enumerate(active):
            run = SimpleNamespace(
                sanity_checking=False,
                state=SimpleNamespace(fn=stage),
                global_step=100 * number,
                callback_metrics={"val/active_units": torch.tensor(count)},
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                watch.on_validation_end(run, model)
            steps += [100 * number] * len(caught)
            again = CollapseWarning(**options)
            again.load_state_dict(watch.state_dict())  # as after a restart
            watch = again
        return steps

    assert warnings_at([0] * 30) == [1400]  # five validations from step 1000 on, once
    assert warnings_at([1] * 30) == []  # 5 % of 20 are not below 5 %
    assert warnings_at([0] * 30, min_active=0.2, after_steps=0, patience=1) == [0]
    assert warnings_at([0, 0, 5, 0, 0, 5] * 5, after_steps=0, patience=3) == []
    warmup = {"name": "elbo", "kl_warmup_steps": 2000}
    assert warnings_at([0] * 30, objective=warmup) == [2400]
    assert warnings_at([0] * 30, stage="validate") == []
