"""What becomes of freed memory: counted as page faults of a real process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from vit_train.training.strategy import SingleDevice

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB, made and freed
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

faults_of_a_step()
before = faults_of_a_step()
SingleDevice(device="cpu").start()
faults_of_a_step()
print(before, faults_of_a_step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_gets_the_memory_that_the_last_one_freed():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before > 1000  # or there is nothing to keep, and the test says nothing
    assert after < 10
