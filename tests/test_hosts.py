"""Two hosts under torchrun's elastic launcher, as joined network namespaces, one of which loses its rank."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment, torchrun

pytestmark = pytest.mark.ddp

WORKER = Path(__file__).with_name("host_worker.py")
TIMEOUT = 300


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two network namespaces with one address each, 10.203.7.1 and .2; nothing but this link joins them."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command `ip` (package iproute2)")
    names = [f"sl{os.getpid()}{letter}" for letter in "ab"]
    made = ip("netns", "add", names[0])
    if made.returncode != 0:
        pytest.skip(f"may not add a network namespace: {made.stderr.strip()}")
    try:
        steps = [
            ("netns", "add", names[1]),
            ("link", "add", names[0], "type", "veth", "peer", "name", names[1]),
            *(("link", "set", name, "netns", name) for name in names),
        ]
        for number, name in enumerate(names, 1):
            inside = ("-n", name)
            steps += [
                (*inside, "addr", "add", f"10.203.7.{number}/24", "dev", name),
                (*inside, "link", "set", name, "up"),
                (*inside, "link", "set", "lo", "up"),
            ]
        for step in steps:
            done = ip(*step)
            if done.returncode != 0:
                pytest.skip(f"may not do `ip {' '.join(step)}`: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)  # its end of the link goes with it


def on_two_hosts(names, folder, dying_rank, step):
    processes = []
    for number, name in enumerate(names):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}", "--max-restarts=20"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.203.7.1:29777", f"--local-addr=10.203.7.{number + 1}"]
        # torchrun looks the first host up by its name, which a namespace shares with the machine
        command += [f"--rdzv-conf=is_host={int(number == 0)}"]
        with open(folder / f"host{number}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, str(WORKER), str(folder), str(dying_rank), str(step)],
                    env=environment(GLOO_SOCKET_IFNAME=name, TP_SOCKET_IFNAME=name),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        return [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.parametrize("dying_rank", [0, 1])
def test_a_job_on_two_hosts_survives_the_death_of_a_rank(hosts, dying_rank, tmp_path):
    disturbed, alone = tmp_path / "disturbed", tmp_path / "alone"
    for folder in (disturbed, alone):
        folder.mkdir()
    statuses = on_two_hosts(hosts, disturbed, dying_rank, step=8)
    logs = "\n".join((disturbed / f"host{n}.log").read_text()[-3000:] for n in (0, 1))
    assert statuses == [0, 0], logs
    assert (disturbed / "killed").exists(), logs
    status, output = torchrun(WORKER, alone, -1, 0, timeout=TIMEOUT)
    assert status == 0, output[-3000:]
    restarts = []
    for rank in (0, 1):
        ours, theirs = (torch.load(f / f"rank{rank}.pt", weights_only=True) for f in (disturbed, alone))
        restarts.append(ours["restarts"])
        assert (ours["start"], theirs["start"]) == (6, 0)  # from the checkpoint of step 6, not anew
        assert ours["step"] == theirs["step"] == 12
        for key, value in theirs["state"].items():
            assert torch.equal(ours["state"][key], value), key
    assert max(restarts) >= 1  # a host that only follows the other's restart counts none
