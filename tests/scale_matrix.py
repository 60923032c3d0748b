"""The matrix of layers and ways to run them: every cell is a comparison, and its failure a sentence.

Run as a script it prints the page docs/matrix.md; test_matrix.py runs it as tests.
"""

import logging
import sys
import tempfile
from pathlib import Path

import torch
from processes import torchrun
from scale_runs import ACCUMULATED, NAMES, Joined, build, fit, joined_batches, state

TOLERANCE = 1e-9  # relative, in double precision: the two sides differ in the order of their sums
COLUMNS = ("1 process", "2 processes", "accumulation", "bf16", "compile", "resume")
PAGE = Path(__file__).parent.parent / "docs" / "matrix.md"


def different(ours, theirs, tolerance=0.0):
    """Which entry of two states or lists of losses differs, in words; empty where none does."""
    for key in ours.keys() | theirs.keys():
        if key not in ours or key not in theirs:
            return f"{key} is on one side only"
        a, b = torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])
        if not (torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=tolerance, atol=tolerance))):
            return f"{key} differs by {float((a.double() - b.double()).abs().max()):.2g}"
    return ""


def not_finite(losses, start, end):
    if not all(torch.tensor(list(losses.values())).isfinite()):
        return "a loss is not finite"
    if not all(v.isfinite().all() for v in end.values() if v.is_floating_point()):
        return "a weight is not finite"
    if all(torch.equal(start[k], v) for k, v in end.items() if k.startswith("encoder")):
        return "the encoder does not train"
    return ""


def on_one(name, folder):
    """Columns that one process can tell, and the joined runs that two processes are compared with."""
    cells, joined = {}, {}
    start = state(build(name).double())
    for key, options in (("two", {}), ("accumulated", ACCUMULATED)):
        model = build(name, Joined)
        fit(model, joined_batches(), precision="64-true", **options)
        joined[key] = state(model)
    model = build(name)
    whole = fit(model, joined_batches(), precision="64-true", checkpoints=folder).losses
    again = build(name)
    repeated = fit(again, joined_batches(), precision="64-true").losses
    cells["1 process"] = not_finite(whole, start, state(model)) or different(whole, repeated)
    problems = []
    for step in range(1, len(whole)):
        other = build(name)
        losses = fit(other, joined_batches(), precision="64-true", resume=folder / f"step={step}.ckpt").losses
        problems.append(different({k: v for k, v in whole.items() if k >= step}, losses))
        problems.append(different(state(model), state(other)))
    cells["resume"] = next(filter(None, problems), "")
    compiled = build(name)
    compiled.encoder.compile(backend="aot_eager")
    compiled.decoder.compile(backend="aot_eager")
    losses = fit(compiled, joined_batches(), precision="64-true").losses
    cells["compile"] = different(whole, losses, TOLERANCE) or different(state(model), state(compiled), TOLERANCE)
    return cells, joined


def on_two(name, ranks, joined):
    """The columns of two processes, from what both ranks saw."""
    first, second = (rank[name] for rank in ranks)
    cells = {}
    for way in first:
        cells[way] = different(first[way]["state"], second[way]["state"])  # ranks agree bit for bit
        if not cells[way] and bool((first[way]["noise"] == second[way]["noise"]).any()):
            cells[way] = "two ranks drew the same noise"
    for way in ("two", "accumulated"):
        cells[way] = cells[way] or different(first[way]["state"], joined[way], TOLERANCE)
    resumed = []
    for rank in (first, second):
        for way in (w for w in rank if w.startswith("resumed")):
            step = int(way.split()[1])
            resumed.append(
                different({k: v for k, v in rank["two"]["losses"].items() if k >= step}, rank[way]["losses"])
            )
            resumed.append(different(rank["two"]["state"], rank[way]["state"]))
            resumed.append(cells[way])
    start = state(build(name))
    return {
        "2 processes": cells["two"],
        "accumulation": cells["accumulated"],
        "bf16": cells["bf16"] or not_finite(first["bf16"]["losses"], start, first["bf16"]["state"]),
        "resume": next(filter(None, resumed), ""),
    }


def matrix(names=NAMES, timeout=900):
    """Every cell by name and column: what is wrong, or nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        status, output = torchrun(Path(__file__).with_name("scale_worker.py"), folder, *names, timeout=timeout)
        if status != 0:
            raise RuntimeError(f"the two processes ended with {status}:\n{output[-6000:]}")
        ranks = [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        cells = {}
        for name in names:
            one, joined = on_one(name, Path(folder) / "one" / name.replace(":", "-"))
            two = on_two(name, ranks, joined)
            cells[name] = one | two | {"resume": one["resume"] or two["resume"]}
    return cells


def page(cells):
    lines = [
        "# Every layer, every way to run it",
        "",
        "<!-- generated: PYTHONPATH=. python tests/scale_matrix.py > docs/matrix.md -->",
        "",
        "Measured by the tests, on the CPU with two gloo processes under plain `ddp`, on batches of 26, 26 and 13",
        "rows, of which the last is dealt out unevenly (9 and 4). Networks are small and in double precision (but for",
        "`bf16`), so that equal can mean equal.",
        "",
        "* **1 process**: losses and weights are finite, the encoder trains, and a second run has the same losses, bit",
        "  for bit.",
        "* **2 processes**: ranks draw different noise, and hold the same weights, baselines, codebooks and",
        "  statistics, bit for bit; these equal those of one process that trains on the joined batches with the same",
        f"  noise, to {TOLERANCE:g}. That process draws each rank's noise for its rows from that rank's stream.",
        "* **accumulation**: the same with `accumulate_grad_batches=2` and `gradient_clip_val=0.3`.",
        "* **bf16**: two processes under `bf16-mixed`: finite, the encoder trains, ranks agree bit for bit.",
        "* **compile**: encoder and decoder under `torch.compile` (backend `aot_eager`) give the losses and weights of",
        f"  the run without, to {TOLERANCE:g}.",
        "* **resume**: runs resumed from the checkpoint of every step, inside an epoch and between epochs, on one",
        "  process, and from two steps on two processes, have the losses and the final state of a run left alone, bit",
        "  for bit.",
        "",
        "| layer | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    reasons = []
    for name, row in cells.items():
        marks = []
        for column in COLUMNS:
            if row[column] and row[column] not in reasons:
                reasons.append(row[column])
            marks.append(f"FAILED ({reasons.index(row[column]) + 1})" if row[column] else "yes")
        layer, _, baseline = name.partition(":")
        title = f"`{layer}`" + (f", baseline `{baseline}`" if baseline else "")
        lines.append("| " + " | ".join((title, *marks)) + " |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(page(matrix(sys.argv[1:] or NAMES)))
