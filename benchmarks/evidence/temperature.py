"""Which temperature is best, for the gradient at the layer's params and for that of the encoder's weights?

``rebar`` and ``relax`` tune their temperature by the squared norm of the gradient at their params, example by example:
that is what a layer sees. The published codes take the gradient of the encoder's weights, summed over the batch. Here
both are measured over temperatures, on models that ``binary_vae`` has trained, with all else as it was trained::

    python -m benchmarks.evidence.binary_vae --estimator rebar relax
    python -m benchmarks.evidence.temperature
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.binary_vae import BATCH, Model, negative_elbo
from benchmarks.evidence.mnist import batches, pixels
from benchmarks.evidence.record import Record, arguments, read, save_figure

TEMPERATURES = (0.06, 0.07, 0.08, 0.095, 0.11, 0.125, 0.14, 0.16, 0.18, 0.2)


def measure(model: Model, x: Tensor, num_draws: int, seed: int) -> dict[str, float]:
    """The mean variance of the gradient by a weight of the encoder, and the squared norm of that by the params.

    Args:
        model: A trained model.
        x: One batch ``[B, 784]``.
        num_draws: Redraws of the noise.
        seed: Of the noise, the same for every temperature.
    """
    torch.manual_seed(seed)
    encoder = list(model.encoder.parameters())
    gradients, norms = [], []
    for _ in range(num_draws):
        logits = model.encoder(x)
        sample = model.layer.sample(logits)
        loss = sample.surrogate(negative_elbo(model.decoder, x, sample.z, logits.detach())).sum()
        at_params, *at_weights = torch.autograd.grad(loss, [logits, *encoder])
        gradients.append(torch.cat([g.flatten() for g in at_weights]) / BATCH)
        norms.append(at_params.square().sum() / BATCH)
    stacked, norm = torch.stack(gradients), torch.stack(norms)
    # one value for each redraw, whose mean is the variance, so that its spread says how sure that is
    parts = (stacked - stacked.mean(0)).square().mean(1) * num_draws / (num_draws - 1)
    return {
        "weights": float(parts.mean()),
        "weights_error": float(parts.std() / num_draws**0.5),
        "params": float(norm.mean()),
        "params_error": float(norm.std() / num_draws**0.5),
    }


def scan(name: str, path: Path, x: Tensor, num_draws: int, seed: int) -> dict[str, Any]:
    """The learned temperature of a trained model, and both measures over temperatures.

    Raises:
        ValueError: The model was not trained yet.
    """
    if not path.is_file():
        raise ValueError(
            f"needed the state {path}, got no such file; run benchmarks.evidence.binary_vae --estimator {name}."
        )
    model = Model(name)
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    learned = model.layer.temperature.item()
    points = []
    for temperature in TEMPERATURES:
        model.layer.temperature = temperature
        points.append({"temperature": temperature, **measure(model, x, num_draws, seed)})
        print(f"{name:8s} {temperature:6.3f}  {points[-1]['weights']:.3e}  {points[-1]['params']:.1f}", flush=True)
    return {"step": state["step"], "learned": learned, "points": points}


def plot(out: Path) -> None:
    """Both measures over the temperature, each relative to its lowest value."""
    import matplotlib.pyplot as plt

    scans = read(out / "temperature.json")["scans"]
    figure, panels = plt.subplots(1, len(scans), figsize=(6 * len(scans), 4.2), sharey=True, squeeze=False)
    labels = {"params": "squared norm at the layer's params", "weights": "variance at the encoder's weights"}
    for axes, (name, content) in zip(panels[0], scans.items(), strict=True):
        x = [p["temperature"] for p in content["points"]]
        for key, label in labels.items():
            values = [p[key] for p in content["points"]]
            errors = [p[f"{key}_error"] / min(values) for p in content["points"]]
            axes.errorbar(x, [v / min(values) for v in values], errors, marker=".", capsize=2, label=label)
        axes.axvline(content["learned"], color="black", linestyle=":", label="learned temperature")
        axes.set(xlabel="temperature", title=f"{name}, after {content['step']:,} steps")
        axes.grid(alpha=0.3)
    panels[0][0].set(ylabel="relative to its lowest value")
    panels[0][0].legend(fontsize=8)
    save_figure(figure, out / "temperature.png")
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--estimator", choices=("rebar", "relax"), nargs="+", default=["rebar", "relax"])
    parser.add_argument("--seed", type=int, default=0, help="of the trained models")
    parser.add_argument("--draws", type=int, default=400, help="redraws for each temperature")
    options: argparse.Namespace = parser.parse_args(words)
    torch.set_num_threads(1)
    if not options.plot:
        x = next(iter(batches(pixels(options.data)[0], BATCH, options.seed)))
        record = Record("temperature", options.out / "temperature.json", options)
        scans: dict[str, Any] = {}
        for name in options.estimator:
            path = options.out / "binary_vae" / f"{name}-seed{options.seed}.pt"
            scans[name] = scan(name, path, x, options.draws, options.seed)
            record.write(scans=scans)
    plot(options.out)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of the whole process, so that a caller of main() is spared it
    main()
