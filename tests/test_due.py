"""What is recorded at optimizer steps: once for each of them, however many batches one of them accumulates."""

from image_runs import loader, trainer

from lightning_modules import VAE, Pictures, Report
from lightning_modules.callbacks.figures import curves


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
