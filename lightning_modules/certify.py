"""The command ``stochastic-layers certify``: run the conformance kit over layers and print their certificates."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import stochastic_layers as sl
from lightning_modules.catalogue import registered_name
from lightning_modules.terminal import InParts, interruptible
from stochastic_layers.testing import CHECKS, Certificate, check_layer

__all__ = ["certificate_markdown", "certificate_table", "certify", "main"]

COLUMNS = ("layer", "law tested", "states", "gradients", "largest z", "relative bias", "evaluations", "result")
GRADIENTS = {"exact": "exact", "statistical": "statistical", "none": "not tested"}


def certify(
    names: Sequence[str] = (),
    *,
    family: str | None = None,
    quick: bool = False,
    backend: str = "aot_eager",
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[Certificate]:
    """The certificates of registered layers, with every family that they accept.

    Args:
        names: The layers, by their names or class paths; by default all.
        family: Only this family.
        quick: Leave out compilation and the means of the gradients.
        backend: Backend for the check of ``torch.compile``.
        jobs: Number of processes, which share the threads of this one. Certificates do not depend on it.
        progress: A progress bar to advance.

    Raises:
        ValueError: Unknown name or family, or a layer that does not accept it, or ``jobs < 1``.
    """
    if jobs < 1:
        raise ValueError(f"needed jobs >= 1, got {jobs}.")
    classes = [registered_name(name) for name in names]  # before the family, which may be of the same module
    known = sl.list_layers(family=family)
    if others := [name for name in classes if family not in (None, *sl.describe(name).families)]:
        raise ValueError(f"needed layers of the family {family!r}, got {others}; valid ones: {', '.join(known)}.")
    pairs = [
        (name, f)
        for name, registered in zip(list(names) or known, classes or known, strict=True)
        for f in sl.describe(registered).families
        if family in (None, f)
    ]
    task = progress.add_task("", total=len(pairs)) if progress else None
    certificates = []
    with contextlib.closing(_certificates(pairs, partial(_certificate, quick=quick, backend=backend), jobs)) as found:
        for (name, law), certificate in zip(pairs, found, strict=True):
            certificates.append(certificate)
            if progress and task is not None:
                progress.update(task, advance=1, description=f"{name} ({law})")
    return certificates


def _certificate(pair: tuple[str, str], *, quick: bool, backend: str) -> Certificate:
    name, family = pair
    return check_layer(registered_name(name), family=family, quick=quick, backend=backend)


def _certificates(
    pairs: Sequence[tuple[str, str]], certificate: partial[Certificate], jobs: int
) -> Generator[Certificate, None, None]:
    """One certificate after the other, in order."""
    if jobs == 1:
        yield from map(certificate, pairs)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")  # a fork of a process whose threads run may hang
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            yield from pool.map(certificate, pairs)
        finally:
            pool.shutdown(cancel_futures=True)  # after an interrupt


def _row(certificate: Certificate) -> tuple[str, ...]:
    """One row of text, in the order of :data:`COLUMNS`."""
    stated = {True: "unbiased", False: "biased"}
    unbiased = certificate.unbiased
    biases = [
        f"{check.rpartition(', ')[2].removesuffix(' cost')} {100 * bias:.1f} ± {100 * error:.1f} %"
        for check, (bias, error) in certificate.biases.items()
    ]
    z = certificate.largest_z
    return (
        certificate.layer,
        certificate.law,
        f"unbiased {unbiased}" if isinstance(unbiased, str) else stated[unbiased],
        "measured" if certificate.proof == "none" and biases else GRADIENTS[certificate.proof],
        "" if z is None else f"{z:.1f}",
        ", ".join(biases),
        "" if certificate.evaluations is None else str(certificate.evaluations),
        "passed" if certificate.passed else "FAILED",
    )


def certificate_table(certificates: Sequence[Certificate]) -> Table:
    """The certificates, one row each, for the terminal."""
    table = Table(title="certificates")
    for column in COLUMNS:
        words = column in ("law tested", "states", "relative bias")  # of many of them, which may be wrapped
        table.add_column(column, no_wrap=not words, min_width=16 if words else None)
    for certificate in certificates:
        table.add_row(*_row(certificate), style=None if certificate.passed else "red")
    return table


def certificate_markdown(certificates: Sequence[Certificate]) -> str:
    """The page ``docs/certificates.md``."""
    lines = [
        "# Certificates",
        "",
        "<!-- generated: stochastic-layers certify --markdown > docs/certificates.md -->",
        "",
        f"Every registered layer, with every family it accepts, under the {len(CHECKS)} checks of",
        "`stochastic_layers.testing.check_layer`. Made by `stochastic-layers certify --markdown`, and yours to run.",
        "",
        "* **gradients**: `exact` where encoder gradient, decoder gradient and value have no spread and equal the",
        "  exact ones up to rounding; `statistical` where their means were compared, with as many draws as make a bias",
        "  of 5 % stand 8 standard errors out (power 0.998; false alarms 6e-7 per coordinate), on constant, linear,",
        "  quadratic, cubic and asymmetric costs; where the exact one is a numerical integral, its error, what a finer",
        "  rule changes, counts as noise; `measured` where the layer states a bias and inexact draws; `not tested` for",
        "  quantisers, whose draw is a step function of params: its true gradient is zero.",
        "* **largest z**: the largest deviation of all tested means that have a spread, in standard errors; 5 fails.",
        "  About a hundred coordinates are tested for each row, so that 2 to 3.5 is what chance gives.",
        "* **relative bias**: for layers that state a bias or a condition, the norm of the encoder gradient's bias",
        "  over the norm of the exact gradient, by cost, with at most this standard error. It is that of this cost and",
        "  these params, at the layer's default options, and grows or shrinks with them.",
        "* **evaluations**: points at which the cost was evaluated in one training step, as counted.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for certificate in certificates:
        name, *rest = _row(certificate)
        lines.append("| " + " | ".join((f"`{name}`", *rest)) + " |")
    return "\n".join(lines)


def main(args: Sequence[str]) -> int:
    """Run ``stochastic-layers certify`` and return its exit status: 1 where a check failed, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="stochastic-layers certify", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="layers, by name or class path; by default all")
    parser.add_argument("--family", help="only this distribution family")
    parser.add_argument("--quick", action="store_true", help="leave out compilation and the means of the gradients")
    parser.add_argument("--compile", default="aot_eager", metavar="BACKEND", help="of torch.compile (aot_eager)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of processes (1)")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/certificates.md")
    parser.add_argument("--verbose", action="store_true", help="print every row of every certificate")
    options = parser.parse_args(list(args))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with interruptible(), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            certificates = certify(
                options.names,
                family=options.family,
                quick=options.quick,
                backend=options.compile,
                jobs=options.jobs,
                progress=progress,
            )
    except KeyboardInterrupt:
        print("stochastic-layers: interrupted.", file=sys.stderr)
        return 130
    failed = [certificate for certificate in certificates if not certificate.passed]
    if options.markdown:
        print(certificate_markdown(certificates))
    else:
        console = Console()
        for certificate in certificates if options.verbose else failed:
            console.print(str(certificate), markup=False, highlight=False, soft_wrap=True)
        console.print(InParts(certificate_table(certificates), names=2))
    return 1 if failed else 0
