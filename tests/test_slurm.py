"""scripts/slurm_train.sh: a job that is signalled before its time limit requeues itself and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, environment

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm_train.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# What the cluster has: srun starts the rest of its arguments, scontrol writes down what it was asked.
COMMANDS = {
    "srun": 'echo "$@" >> srun.log\necho $$ > task.pid\nexec "$@"',
    "scontrol": 'echo "$@" >> scontrol.log',
    "vit-train": f'exec "{sys.executable}" -m vit_train "$@"',
}


def test_the_script_is_bash_without_unset_variables():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    text = SCRIPT.read_text()
    assert text.isascii()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -u\n" in text
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    first_command = text.index("\nset -u\n")
    assert text.rindex("#SBATCH") < first_command, "sbatch reads no options after the first command"
    assert os.access(SCRIPT, os.X_OK)


@pytest.fixture
def job(tmp_path):
    """Starts the script as job 4711 in an empty directory, on a cluster of shell scripts."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()

    def start(*arguments, **variables):
        path = f"{commands}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            cwd=home,
            env={**environment(), "PATH": path, "SLURM_JOB_ID": "4711", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.home = home
    return start


def wait_until_it_stands_still(process, file):
    """Until the process whose id is in the file has stopped itself at its fault point."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.exists() and (pid := file.read_text().strip()):
            state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
            if state.stdout.startswith("T"):
                return int(pid)
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it never came to its first save")


@pytest.mark.faults
def test_a_job_requeues_itself_until_its_run_is_done(job):
    home, arguments = job.home, (*TINY, "trainer.async_save=false")
    first = job(*arguments, VIT_TRAIN_FAULT="save.begin:2:SIGSTOP")
    task = wait_until_it_stands_still(first, home / "task.pid")
    os.kill(task, signal.SIGUSR1)
    os.kill(task, signal.SIGCONT)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 138, err
    assert "stopped by SIGUSR1; step 11 is saved" in out, "in the step after the save of step 10"
    assert (home / "scontrol.log").read_text() == "requeue 4711\n"

    second = job(*arguments)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert (home / "scontrol.log").read_text() == "requeue 4711\n", "a finished job is not requeued"
    started = (home / "srun.log").read_text().splitlines()
    assert started == [" ".join(["vit-train", *arguments])] * 2, "the very same command"
    (run,) = (home / "runs").glob("*/*")
    assert run.name == "job_4711"
    assert json.loads((run / "result.json").read_text())["steps"] == 15
    assert len(json.loads((run / "run.json").read_text())["started"]) == 2


@pytest.mark.faults
def test_another_failure_ends_the_job_with_its_code(job):
    done = job("optimizer.lr=abc")
    _, err = done.communicate(timeout=120)
    assert done.returncode == 2
    assert "vit-train: error: optimizer.lr" in err
    assert not (job.home / "scontrol.log").exists()
