"""A small comparison: its settings, specifications of its runs, and a result without any run."""

from lightning_modules import Comparison
from lightning_modules.comparison.plan import Candidate, make_run
from lightning_modules.comparison.result import IDENTITY, METRICS
from lightning_modules.comparison.settings import parse, settings_of

SMALL = ["--model.layer_options.latent_dim=4", "--data.binarization=dynamic", "--trainer.accelerator=cpu"]


def small_comparison(folder):
    """Settings of a small model, and a function that makes the specification of a training run in ``folder``."""
    parsed = parse(args=SMALL)
    shared = settings_of(parsed)

    def spec(layer, seed=0, start=None, config=shared.config, **options):
        base = {"config": config, "budget": {"steps": 4}, "points": 2, "start": start}
        candidate = Candidate(layer, layer, {"latent_dim": 4, "family": "bernoulli", **options}, 4)
        return make_run(folder / "runs", "training", candidate, seed, base)

    return parsed, shared, spec


def some_result(values):
    """A comparison of the layers in ``values``: label -> ELBO of each seed, ``None`` for a failure."""
    rows, curves = [], []
    for number, (label, elbos) in enumerate(values.items()):
        for seed, elbo in enumerate(elbos):
            row = dict.fromkeys([*IDENTITY, *(m.name for m in METRICS["training"])])
            row |= {"label": label, "layer": label, "options": {"latent_dim": 4}, "seed": seed, "evaluations": 4}
            row |= {"status": "failed", "error": "ValueError: it broke"} if elbo is None else {"status": "ok"}
            if elbo is not None:
                row |= {m.name: 10.0 ** (number - 1) for m in METRICS["training"]} | {"elbo": elbo}
                for step in range(1, 6):
                    point = {"step": step, "seconds": 0.1 * step, "elbo": elbo - 10 / step, "grad_variance": 1 + number}
                    curves.append({"label": label, "seed": seed, **point, "grad_snr": None})
            rows.append(row)
    return Comparison("training", "a title", rows, curves, {"enumeration": "too many."}, {})
