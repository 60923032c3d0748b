"""Does a run that something happens to end in the right result or a clear error, with nothing lost? 200 times and more.

Serves the decision whether jobs may be left alone on a cluster. Each trial trains a small VAE with a random layer and
lets one random fault happen. Then the job is started again as a launcher would: it continues from the last checkpoint
(where that is refused as damaged, from the one that the refusal offers), and must end with exactly the weights,
baselines and codebooks of a job that nothing happened to, having lost no more steps than lie between two checkpoints.

    python benchmarks/faults/campaign.py --trials 236 --seed 0 --out benchmarks/faults/results.json

Linux only; some faults need the right to mount. Trials are reproducible up to the scheduling of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from interruptions import INTERRUPTIONS, interrupted, undisturbed_runs
from job import INTERVAL, LAYERS, STEPS, Plan
from processes import Ended, Job
from scenarios import SCENARIOS, Bench, Scenario
from verdict import Verdict

# How often each fault is tried, out of 236; what needs two processes or W&B takes longer.
SHARES = {
    "kill": 40,
    "kill_saving": 40,
    "rank_lost": 14,
    "sigterm": 24,
    "nan": 20,
    "truncated": 22,
    "bit_flipped": 22,
    "disk_full": 16,
    "read_only": 12,
    "wandb_unreachable": 4,
    "wandb_dies": 6,
    "compare_interrupted": 8,
    "sweep_interrupted": 8,
}


def ending(ended: Ended) -> str:
    """One word for how a job ended."""
    if ended.finished:
        return "finished"
    if "hang" in ended.statuses:
        return "hang"
    return "error" if any(status == 1 for status in ended.statuses) else "signal"


def trial(
    fault: str, scenario: Scenario, seed: int, references: dict[tuple[str, int], Path], seconds: float
) -> Verdict:
    """Let one fault happen, start the job again, and judge."""
    rng = random.Random(seed)
    layer, ranks = rng.choice(sorted(LAYERS)), rng.choice(scenario.ranks)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name) / "checkpoints", Path(name) / "notes", layer, ranks, seconds * ranks**0.5, rng)
        bench.folder.mkdir()
        bench.notes.mkdir()
        first = scenario.happen(bench)
        message = "; ".join(dict.fromkeys(error.splitlines()[0] for error in first.errors if error))
        verdict = Verdict(
            fault=fault,
            layer=layer,
            ranks=ranks,
            seed=seed,
            first=ending(first),
            reached=first.reached,
            launcher=first.launcher,
            message=message.replace(name, "")[:300],
        )
        verdict.problem = judge(bench, scenario, first, verdict, references[layer, ranks])
    verdict.seconds = round(time.monotonic() - begun, 2)
    return verdict


def judge(bench: Bench, scenario: Scenario, first: Ended, verdict: Verdict, reference: Path) -> str:
    """What is wrong with a trial whose first job has ended; starts the job again where it has not finished."""
    if verdict.first == "hang":
        return "the job did not end by itself"
    if verdict.first == "error" and not any(word in error for error in first.errors for word in scenario.error):
        return f"an error that does not name what happened, {scenario.error}"
    done = bench.notes / "fault"
    if not first.finished:
        plan, before = Plan(), _reached(bench)
        offer = re.search(r"use the newest intact one, (\S+)\.$", first.errors[0]) if first.errors else None
        if offer:
            plan, verdict.offered = Plan(resume=offer[1]), True
        done = bench.notes / "again"
        again = Job(bench.folder, done, bench.layer, bench.ranks, plan).wait()
        verdict.resumed = again.start
        if not again.finished:
            return f"the job started again ended with {again.statuses}: {again.errors}"
        verdict.lost = before - again.start
        if verdict.lost > INTERVAL:
            return f"{verdict.lost} steps were lost"
    for rank in range(bench.ranks):
        ours, theirs = (torch.load(f / f"final{rank}.pt", weights_only=True) for f in (done, reference))
        for key, value in theirs.items():
            if not torch.equal(ours[key], value):
                return f"{key} of rank {rank} is not that of the undisturbed job"
    return ""


def _reached(bench: Bench) -> int:
    """The last step that any job of this trial has made."""
    lines = [line.split() for journal in bench.notes.glob("*/journal0") for line in journal.read_text().splitlines()]
    return max((int(number) for kind, number in lines if kind == "step"), default=0)


def undisturbed(folder: Path) -> tuple[dict[tuple[str, int], Path], float]:
    """The final states of jobs to which nothing happens, by layer and ranks, and how long one takes."""
    references, seconds = {}, []
    for layer in sorted(LAYERS):
        for ranks in (1, 2):
            notes = folder / f"{layer}{ranks}"
            ended = Job(folder / f"checkpoints-{layer}{ranks}", notes, layer, ranks, Plan()).wait()
            if not ended.finished:
                raise RuntimeError(f"the undisturbed job of {layer} on {ranks} ranks ended with {ended}")
            references[layer, ranks] = notes
            if ranks == 1:
                seconds.append(ended.seconds)
    return references, sorted(seconds)[len(seconds) // 2]


def campaign(trials: int, seed: int, only: list[str] | None = None) -> dict[str, Any]:
    """Run the trials, in random order, and return the record of them."""
    rng = random.Random(seed)
    faults = SCENARIOS | INTERRUPTIONS
    names = [n for n in faults if not only or n in only]
    skipped = {n: reason for n in names if (reason := faults[n].possible())}
    shares = {n: SHARES[n] for n in names if n not in skipped}
    total = sum(shares.values())
    plan = [n for n, share in shares.items() for _ in range(max(1, round(trials * share / total)))]
    rng.shuffle(plan)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder:
        references, seconds = undisturbed(Path(folder)) if SCENARIOS.keys() & shares else ({}, 0.0)
        commands = {n: undisturbed_runs(INTERRUPTIONS[n]) for n in INTERRUPTIONS.keys() & shares}
        for number, fault in enumerate(plan):
            own = seed * 1_000_003 + number
            if fault in INTERRUPTIONS:
                verdict = interrupted(fault, own, *commands[fault])
            else:
                verdict = trial(fault, SCENARIOS[fault], own, references, seconds)
            verdicts.append(verdict)
            print(f"{number + 1}/{len(plan)} {fault} {verdict.layer} x{verdict.ranks}: {verdict.first}", end="")
            print(f", resumed at {verdict.resumed}: {verdict.problem or 'fine'} ({verdict.seconds} s)", flush=True)
    return {
        "steps": STEPS,
        "interval": INTERVAL,
        "seeds": [seed],
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
        "skipped": skipped,
        "trials": [asdict(v) for v in verdicts],
    }


def add(record: dict[str, Any], file: Path) -> None:
    """Add the trials of a record to those that a file holds already."""
    if file.exists():
        before = json.loads(file.read_text())
        record = record | {key: before[key] + record[key] for key in ("seeds", "trials")}
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, file)


def main() -> int:
    """Entry point; the status is 1 where a trial has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=236)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="FAULT", help=f"of {', '.join(SHARES)}")
    parser.add_argument("--out", type=Path, help="add the record, as JSON, to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = campaign(options.trials, options.seed, options.only)
    if options.out:
        add(record, options.out)
    problems = [t for t in record["trials"] if t["problem"]]
    print(f"{len(record['trials'])} trials, {len(problems)} with a problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
