"""The command ``stochastic-layers compare``: layers side by side on one's own model and data."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from lightning_modules.catalogue import registered_name
from lightning_modules.comparison.plots import draw
from lightning_modules.comparison.publish import publish
from lightning_modules.comparison.report import make_reports, reports_package
from lightning_modules.comparison.result import METRICS, Comparison, sorting
from lightning_modules.comparison.runner import DEFAULT_STEPS, Budget, compare_parsed
from lightning_modules.comparison.settings import loggers, parse
from lightning_modules.comparison.table import markdown_table, notes, rich_table
from lightning_modules.terminal import InParts, interruptible
from lightning_modules.whole_files import write_text

__all__ = ["main"]

MAX_WIDTH = 400
EPILOG = """All other arguments are those of `stochastic-layers fit` and mean the same: --config FILE, --model.*,
--data.*, --trainer.*. --ckpt_path CHECKPOINT takes model, data and first weights from a checkpoint. A rerun of the same
command does only what is missing."""


def _layers(text: str) -> list[Any]:
    """``disarm, {name: gumbel_softmax, temperature: 0.5}`` as YAML; names may also be apart by spaces."""
    try:
        names: list[Any] = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"needed names or {{name: NAME, OPTION: VALUE}}, got {text!r}") from error
    return [part for name in names for part in (name.split() if isinstance(name, str) else [name])]


def _registered(layer: Any) -> Any:
    """A layer with its registered name in the place of a class path."""
    if isinstance(layer, dict) and isinstance(layer.get("name"), str):
        return layer | {"name": registered_name(layer["name"])}
    return registered_name(layer) if isinstance(layer, str) else layer


def _seeds(text: str) -> list[int]:
    """``3`` is a number of seeds, ``0,1,2`` and ``5,`` are seeds."""
    try:
        return [int(word) for word in text.split(",") if word.strip()] if "," in text else list(range(int(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needed a number of seeds or seeds like 0,1,2, got {text!r}") from None


def parser() -> argparse.ArgumentParser:
    """The options of the command itself."""
    p = argparse.ArgumentParser(
        prog="stochastic-layers compare", description=__doc__, epilog=EPILOG, allow_abbrev=False
    )
    p.add_argument(
        "--layers",
        type=_layers,
        nargs="+",
        help="names or class paths, or {name: NAME, OPTION: VALUE, label: TEXT}; by default all that fit the model",
    )
    p.add_argument("--steps", type=int, help=f"budget of optimizer steps ({DEFAULT_STEPS})")
    p.add_argument("--seconds", type=float, help="budget of training time instead, measurements not counted")
    p.add_argument("--seeds", type=_seeds, default=list(range(3)), help="a number of seeds, or seeds like 0,1,2 (3)")
    p.add_argument("--evaluations", type=int, help="largest number of evaluations of the cost in a step (4)")
    p.add_argument(
        "--score",
        action="store_true",
        help="train nothing but the model's own layer, if there is no --ckpt_path, and score all layers on its weights",
    )
    p.add_argument("--folder", type=Path, default=Path("runs/compare"), help="where results are kept (runs/compare)")
    p.add_argument("--workers", type=int, default=1, help="processes at a time; times are fair with one (1)")
    p.add_argument("--sort", help="metric that the table is sorted by")
    p.add_argument(
        "--report", action="store_true", help="make a draft report in W&B too; takes --trainer.logger=WandbLogger"
    )
    return p


def main(rest: Sequence[str]) -> int:
    """Run ``stochastic-layers compare`` and return its exit status: 1 where a run, or the report, failed."""
    options, words = parser().parse_known_args(list(rest))
    own = [f"--{name}" for name in vars(options)]  # of which the parser of all other options knows nothing
    for name in (word.partition("=")[0] for word in words if word.startswith("--")):
        if close := get_close_matches(name, own, 1, cutoff=0.85):
            raise ValueError(f"needed an option of compare or fit, got {name!r}; did you mean {close[0]!r}?")
    sorting(METRICS["scores" if options.score else "training"], options.sort)  # a mistake is found now, not after hours
    parsed = parse(args=words)
    found = loggers(parsed)
    if options.report:
        reports_package()
        if not any(isinstance(logger, WandbLogger) for logger in found):
            raise ValueError("needed a W&B run for --report, got none; add --trainer.logger=WandbLogger.")
    try:
        with interruptible():
            comparison = compare_parsed(
                parsed,
                options.layers and [_registered(layer) for part in options.layers for layer in part],
                budget=Budget.of(options.steps, options.seconds),
                seeds=options.seeds,
                evaluations=options.evaluations,
                score=options.score,
                folder=options.folder,
                workers=options.workers,
                console=Console(stderr=True),
            )
    except KeyboardInterrupt:
        print(
            f"stochastic-layers: interrupted; the finished runs are in {options.folder / 'runs'}, and the same command "
            "does the rest.",
            file=sys.stderr,
        )
        return 130
    command = shlex.join(["stochastic-layers", "compare", *rest])
    comparison = replace(comparison, settings=comparison.settings | {"command": command})
    files = write(comparison, options.folder, options.sort)
    console = Console()
    if not console.is_terminal:  # a file has no width that a table could be cut to
        console.width = MAX_WIDTH
    console.print(InParts(rich_table(comparison, options.sort)))
    for note in notes(comparison):
        console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    for file in files:
        console.print(f"written: {file}", highlight=False, soft_wrap=True)
    published = publish(comparison, [file for file in files if file.suffix == ".png"], found, options.sort)
    good = all(row["status"] == "ok" for row in comparison.rows)
    if options.report:
        good = make_reports(comparison, published, files[0], options.sort) and good
    return 0 if good else 1


def write(comparison: Comparison, folder: Path, sort: str | None = None) -> list[Path]:
    """Write the results as JSON, CSV and Markdown, and the pictures."""
    name = comparison.kind
    comparison.to_json(folder / f"{name}.json")
    comparison.to_csv(folder / f"{name}.csv")
    write_text(folder / f"{name}.md", f"{comparison.title}\n\n{markdown_table(comparison, sort)}\n")
    return [*(folder / f"{name}.{kind}" for kind in ("json", "csv", "md")), *draw(comparison, folder, sort)]
