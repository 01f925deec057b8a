"""What is freed is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import random, resource, sys
import torch
from captionfix.memory import keep_freed

if sys.argv[1] == "keep":
    assert keep_freed()
torch.set_num_threads(1)
random.seed(0)
held = []
for i in range(400):  # results of a network's layers: of all sizes, some held for a while
    if i == 300:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held.append(torch.ones(random.choice([200_000, 500_000, 1_000_000, 3_000_000, 6_000_000, 8_000_000])))
    del held[:-4]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again():
    def faults(how):
        run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("keep") < faults("leave") / 5
