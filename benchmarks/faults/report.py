"""The report of a campaign, made from its record: `python benchmarks/faults/report.py > docs/faults.md`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from interruptions import INTERRUPTIONS
from scenarios import SCENARIOS

__all__ = ["report"]

FAULTS = SCENARIOS | INTERRUPTIONS
RECORD = Path(__file__).with_name("results.json")


def report(record: dict[str, Any]) -> str:
    """The page ``docs/faults.md`` of a record."""
    trials, versions = record["trials"], record["versions"]
    problems = [t for t in trials if t["problem"]]
    used = ", ".join(f"`{name}`" for name in sorted({t["layer"] for t in trials}))
    columns = (
        "fault",
        "trials",
        "on two ranks",
        "finished",
        "error",
        "killed",
        "offered another",
        "most lost",
        "failed",
    )
    lines = [
        "# Faults",
        "",
        "<!-- generated: python benchmarks/faults/report.py > docs/faults.md -->",
        "",
        f"{len(trials)} trials, each with one random fault. A trial trains a small VAE for {record['steps']} steps,",
        f"with a checkpoint every {record['interval']} steps (an epoch has 5, so that most lie inside one), lets the",
        'fault happen at a random moment, and starts the job again as a launcher would: with `ckpt_path="last"`, or',
        "from the checkpoint that a refusal offers. The trial passes where the job ends by itself with an error that",
        f"names the fault (or is killed), the next one loses at most {record['interval']} steps, and its final",
        "weights, baselines, codebooks and statistics are those of a job that nothing happened to, bit for bit.",
        "",
        "A comparison or a sweep of two small runs gets SIGINT, SIGTERM or SIGKILL, and the same command is given",
        "again: no run that was finished may be made anew, and the results must be those of an undisturbed command.",
        "*Most lost* counts runs there.",
        "",
        f"Passed: {len(trials) - len(problems)} of {len(trials)}. Python {versions['python']}, torch",
        f"{versions['torch']}, Lightning {versions['lightning']}, Linux, CPU, seeds",
        f"{', '.join(map(str, record['seeds']))}. Layers, drawn at random: {used}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for name, scenario in FAULTS.items():
        of = [t for t in trials if t["fault"] == name]
        if name in record["skipped"]:
            lines.append(f"| {scenario.title} | 0: {record['skipped'][name]} |" + " |" * (len(columns) - 2))
        if not of:
            continue
        ends = Counter(t["first"] for t in of)
        lost = max((t["lost"] for t in of), default=0)
        cells = [scenario.title, len(of), sum(t["ranks"] == 2 for t in of), ends["finished"], ends["error"]]
        cells += [ends["signal"], sum(t["offered"] for t in of), lost, sum(bool(t["problem"]) for t in of)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    waiting = sum(t["launcher"] for t in trials)
    lines += [
        "",
        "*finished*: the fault came too late or was survived, and the result was right at once; *error*: a Python",
        "exception; *killed*: by a signal; *offered another*: the damaged checkpoint was refused and an intact one",
        "offered; *most lost*: steps that had to be made again. A damaged checkpoint that is not refused is one whose",
        "flipped bit lies in the padding between its records.",
        "",
        f"In {waiting} trials a rank had to be ended by force, as launchers and schedulers do: it did not find out",
        "within 15 seconds that the other one was gone (one that is lost before the ranks have met is waited for until",
        "the timeout of `torch.distributed`), or did not end within 20 seconds of SIGTERM. Those count as *killed*.",
        "",
        "What the errors look like:",
        "",
    ]
    for name, scenario in FAULTS.items():
        messages = [t["message"] for t in trials if t["fault"] == name and t["message"] and t["first"] == "error"]
        if messages:
            lines.append(f"* {scenario.title}: `{min(messages, key=len).replace('`', chr(39))}`")
    if problems:
        lines += ["", "Failed:", ""]
        lines += [
            f"* {t['fault']}, {t['layer']} on {t['ranks']} ranks, seed {t['seed']}: {t['problem']}" for t in problems
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(json.loads(RECORD.read_text())))
