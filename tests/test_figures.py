"""Charts of a run: one point for each optimizer step that is logged, and axes that can be read."""

import pytest
import torch
from image_runs import loader, trainer

from lightning_modules import VAE, Pictures, Report
from lightning_modules.callbacks.figures import curves, latent_units


def test_the_closing_table_and_the_curves_count_optimizer_steps(tmp_path):
    report, pictures = Report(), Pictures(str(tmp_path))
    run = trainer(
        tmp_path,
        max_epochs=-1,
        max_steps=6,
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        callbacks=[report, pictures],
    )
    model = VAE("gaussian", {"latent_dim": 2})
    run.fit(model, loader(), loader())
    assert run.global_step == 6 < run.fit_loop.epoch_loop.total_batch_idx
    column = dict(zip(*(column.cells for column in report.table(run, model).columns), strict=True))
    assert column["training steps"] == "6"
    for key in ("train/elbo", "train/grad_variance", "beta"):
        assert [step for step, _ in pictures.history[key]] == [2, 4, 6]


def test_a_curve_of_one_point_is_seen():
    figure = curves({key: [(10, 0.5)] for key in ("train/elbo", "train/grad_variance", "train/grad_snr")})
    assert [axes.lines[0].get_marker() for axes in figure.axes] == ["o"] * 3
    longer = curves({"train/elbo": [(10, 0.5), (20, 0.7)]})
    assert longer.axes[0].lines[0].get_marker() == ""


@pytest.mark.parametrize(("variances", "scale"), [((0.5, 0.6), "linear"), ((0.5, 6.0), "log"), ((0.0, 6.0), "linear")])
def test_the_variance_has_a_logarithmic_scale_where_it_spans_a_power_of_ten(variances, scale):
    figure = curves({"train/grad_variance": list(zip((10, 20), variances, strict=True))})
    assert figure.axes[1].get_yscale() == scale and len(figure.axes[1].lines) == 1


def test_without_noise_there_is_no_ratio_to_it():
    noiseless = {"train/elbo": [(10, -3.0)], "train/grad_variance": [(10, 0.0)], "train/grad_snr": [(10, 8.4e6)]}
    for axes in curves(noiseless).axes[1:]:
        assert not axes.lines and axes.texts[0].get_text() == "no noise was measured"


def test_a_single_latent_is_number_one():
    figure = latent_units(torch.tensor([0.5]), 0.01, torch.tensor([2.0]), [(10, 1.0)])
    figure.draw_without_rendering()
    assert [
        label.get_text() for label in figure.axes[0].get_xticklabels() if 0.4 <= label.get_position()[0] <= 1.6
    ] == ["1"]
