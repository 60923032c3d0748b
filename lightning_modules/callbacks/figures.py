"""Drawing only: numbers in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ["bit_usage", "code_usage", "curves", "image_grid", "latent_units", "schedules"]

History = Mapping[str, Sequence[tuple[int, float]]]  # a series of (optimizer step, value) by its key

MAX_BARS = 64  # above this number bars are too thin to be labelled
DARK, BRIGHT, GREY = "#24476b", "#d1662a", "0.6"


def image_grid(
    images: Tensor, columns: int, rows: Sequence[str] = (), heads: Sequence[str] = (), group: int | None = None
) -> Figure:
    """A figure of images ``[N, C, H, W]`` in [0, 1], row by row.

    Args:
        images: The images; NaN leaves a place empty.
        columns: Number of images in a row.
        rows: A label for each row.
        heads: A label for each column.
        group: Number of columns between wider gaps; by default there are none.
    """
    images = images.detach().float().cpu().clamp(0, 1).nan_to_num(nan=1.0)
    n, c, h, w = images.shape
    height, group = -(-n // columns), group or columns
    gap = -(-w // 4)  # pixels between groups
    places = torch.ones(height * columns, c, h + 1, w + 1)
    places[:n, :, :h, :w] = images
    # [height, columns, c, h, w] -> [height * h, columns * w, c], with the gap to the right of each group of columns
    picture = places.view(height, columns, c, h + 1, w + 1).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    parts = [
        torch.nn.functional.pad(part, (0, 0, 0, gap), value=1.0) for part in torch.split(picture, group * (w + 1), 1)
    ]
    canvas = torch.cat(parts, 1)[:, :-gap]
    margin = 0.5 if rows else 0.0
    width = 0.6 * canvas.shape[1] / (w + 1) + margin
    figure = Figure(figsize=(width, 0.6 * height * h / w + (0.3 if heads else 0)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(canvas.squeeze(-1).numpy() if c == 1 else canvas.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([(w + 1) * (i + 0.5) - 1 + gap * (i // group) for i in range(len(heads))], heads, fontsize=7)
    axes.set_yticks([(h + 1) * (i + 0.5) - 1 for i in range(len(rows))], rows, fontsize=7)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def curves(history: History) -> Figure:
    """ELBO, gradient variance and SNR over optimizer steps."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = [
        ("ELBO (nats per example)", ("train/elbo", "val/elbo")),
        ("gradient variance", ("train/grad_variance",)),
        ("gradient signal-to-noise ratio", ("train/grad_snr",)),
    ]
    variances = [value for _, value in history.get("train/grad_variance", ()) if value > 0]
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels, strict=True):
        measured = {key: history[key] for key in keys if key in history}
        axes.set(title=title, xlabel="optimizer step")
        if "grad" in keys[0] and not variances and history:  # not a ratio to rounding where a layer has no variance
            axes.text(0.5, 0.5, "no noise was measured", ha="center", va="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[], xlabel="")
            continue
        for key, series in measured.items():
            _line(axes, series, label=key)
        if keys == ("train/grad_variance",) and max(variances) > 10 * min(variances):
            axes.set_yscale("log")
        if measured and len(keys) > 1:
            axes.legend(frameon=False)
    return figure


def schedules(history: History) -> Figure:
    """Every series over optimizer steps, one panel each: temperatures and the weight of the KL."""
    figure = Figure(figsize=(3.4 * len(history), 2.8), layout="constrained")
    for axes, (key, series) in zip(figure.subplots(1, len(history), squeeze=False)[0], history.items(), strict=True):
        _line(axes, series, color=DARK)
        axes.set(title=key, xlabel="optimizer step", ylim=(0, 1.05 * max(value for _, value in series)))
    return figure


def latent_units(variances: Tensor, threshold: float, kl: Tensor | None, active: Sequence[tuple[int, float]]) -> Figure:
    """KL of each latent variable and variance of the posterior mean of each unit, sorted; active units over steps.

    Args:
        variances: Variance of the posterior mean over the data ``[U]``.
        threshold: Variance above which a unit is active.
        kl: KL of each latent variable in nats ``[L]``, or of all together ``[1]``; None where there is no closed form.
        active: Number of active units after each validation.
    """
    figure = Figure(figsize=(9.6, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    if kl is None or len(kl) < min(2, len(variances)):
        text = "no closed-form KL" if kl is None else f"KL of all latents together:\n{float(kl.sum()):.3g} nats"
        panels[0].text(0.5, 0.5, text, ha="center", va="center")
        panels[0].set_axis_off()
    else:
        _bars(panels[0], kl.sort(descending=True).values, DARK)
        panels[0].set(title=f"KL per latent, {float(kl.sum()):.3g} nats in all", ylabel="nats")
        panels[0].set(xlabel="latent variable, sorted")
    number = int((variances > threshold).sum())
    _bars(panels[1], variances.clamp_min(1e-6).sort(descending=True).values, DARK)
    panels[1].set(yscale="log", xlabel="unit, sorted", title=f"variance of posterior mean, {number} active")
    panels[1].set_ylim(1e-6, max(2 * float(variances.max()), 10 * threshold))
    panels[1].minorticks_off()  # half of the time that the figure takes
    panels[1].axhline(threshold, color=BRIGHT, linewidth=1, linestyle="--")
    if active:
        _line(panels[2], active, color=DARK)
    panels[2].set(title=f"active units, of {len(variances)}", xlabel="optimizer step")
    panels[2].set_ylim(-0.03 * len(variances), 1.05 * len(variances))  # a line at 0 is not on the frame
    panels[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        axes.title.set_fontsize(10)
    return figure


def bit_usage(probabilities: Tensor) -> Figure:
    """How often each bit is on, ``[U]``; a bit at 0 or 1 says nothing."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, probabilities.sort(descending=True).values, DARK)
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
    axes.set(ylim=(0, 1), xlabel="bit, sorted", title="probability that a bit is on, over the validation data")
    return figure


def code_usage(frequencies: Tensor, perplexity: float, usage: float) -> Figure:
    """Share of each category or code ``[variables, codes]`` over the validation data, codes sorted in each row."""
    variables, codes = frequencies.shape
    ordered = frequencies.sort(-1, descending=True).values.float()
    figure = Figure(figsize=(6.4, 2.8 if variables <= 4 else 3.6), layout="constrained")
    axes = figure.add_subplot()
    if variables <= 4:  # as many lines can be told apart
        for row in ordered:
            axes.step(range(1, codes + 1), row.tolist(), where="mid", linewidth=1.2)
        axes.axhline(1 / codes, color=GREY, linewidth=1, linestyle="--")
        axes.set(ylabel="share", xlabel="code, sorted by share", xlim=(0.9, codes + 0.5), ylim=(0, None))
        if codes > MAX_BARS:  # often a few of many are in use
            axes.set_xscale("log")
    else:
        image = axes.imshow(ordered.numpy(), cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
        axes.set(ylabel="latent variable", xlabel="category, sorted by share")
        figure.colorbar(image, ax=axes, label="share")
    axes.set_title(f"effective number {perplexity:.1f} of {codes}, {usage:.0%} in use", fontsize=10)
    return figure


def _line(axes: Axes, series: Sequence[tuple[int, float]], **style: Any) -> None:
    """A line over optimizer steps; a single point, of which there is no line, is a dot."""
    steps, values = zip(*series, strict=True)
    axes.plot(steps, values, linewidth=1.2, marker="o" if len(steps) == 1 else "", **style)


def _bars(axes: Axes, values: Tensor, color: str) -> None:
    numbers, heights = list(range(1, len(values) + 1)), values.tolist()
    if len(values) <= MAX_BARS:
        axes.bar(numbers, heights, color=color, width=0.8)
    else:
        axes.fill_between(numbers, heights, step="mid", color=color)
    axes.set_xlim(0.4, len(values) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
