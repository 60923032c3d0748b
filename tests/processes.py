"""Starting a job of several processes that cannot outlive its test."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch.multiprocessing as mp

ROOT = Path(__file__).parent.parent


def environment(**extra):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | extra


def heed_interrupts():
    """In a new process, before its program: SIGINT counts, also where the tests run in the background and ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(command, timeout, **extra):
    """Run a command in a session of its own; a hang ends with SIGKILL to all of it. Returns status and output."""
    process = subprocess.Popen(
        command,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        kill_session(process.pid)  # a hanging collective does not react to SIGTERM
        output, _ = process.communicate()
        return "timeout", output
    finally:
        kill_session(process.pid)


def kill_session(leader):
    """SIGKILL to what is left of a session, process groups of its own (which `wandb agent` makes) included."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == leader:
                os.kill(int(folder.name), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)  # where there is no /proc


def torchrun(script, *arguments, timeout, processes=2, **extra):
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return run([*launcher, *address, str(script), *map(str, arguments)], timeout, **extra)


def launch(worker, folder, *names, timeout=900):
    """Run ``tests/<worker> folder *names`` on two processes, which must succeed."""
    status, output = torchrun(Path(__file__).with_name(worker), folder, *names, timeout=timeout)
    assert status == 0, f"{status}: {output[-6000:]}"


def spawn_two(function, *arguments, seconds=120):
    """Call ``function(rank, *arguments)`` in two new processes, which must end in time.

    The function should wait for the other rank (``barrier``) before it destroys the group: a process that holds the
    interpreter lock while it takes gloo down may wait for a collective that waits for that lock.
    """
    context = mp.spawn(function, args=arguments, nprocs=2, join=False)
    try:
        for _ in range(seconds // 2):
            if context.join(timeout=2):
                return
        raise AssertionError(f"the two processes did not end within {seconds} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
