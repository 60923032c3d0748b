"""Started twice by scale_matrix.py: every layer on two ranks, in every way the matrix asks for."""

import logging
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from scale_runs import ACCUMULATED, NAMES, build, fit, shares, state

RESUMED = (2, 4)  # optimizer steps: inside the first epoch and inside the second


def run(name, **options):
    model = build(name)
    where = {"accelerator": os.environ.get("ACCELERATOR", "cpu"), "devices": 2, "strategy": "ddp"}
    recorder = fit(model, shares()[int(os.environ["RANK"])], **where, **options)
    return {"state": state(model), "losses": recorder.losses, "noise": torch.stack(recorder.noise)}


def every_way(name, folder):
    results = {}
    saved = folder / name.replace(":", "-")
    results["two"] = run(name, precision="64-true", checkpoints=saved)
    for step in RESUMED:
        results[f"resumed {step}"] = run(name, precision="64-true", resume=saved / f"step={step}.ckpt")
    results["accumulated"] = run(name, precision="64-true", **ACCUMULATED)
    results["bf16"] = run(name, precision="bf16-mixed")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder, names = Path(sys.argv[1]), sys.argv[2:] or NAMES
    results = {}
    for name in names:
        try:
            results[name] = every_way(name, folder)
        except Exception:
            # the other rank may be waiting in a collective: end the job, and say whose fault it was
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
            raise
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()
