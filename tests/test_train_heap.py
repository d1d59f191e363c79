"""Memory that a process has freed goes back to the system."""

import platform

import pytest

# Blocks of 4 MiB, of which every second one is freed: kept in the heap they would be holes of it.
CODE = """
import os
from sigphi.train.heap import return_freed_blocks
import torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if {applied}:
    return_freed_blocks()
torch.ones(2**22)  # freed: by default blocks of this size are taken from the heap from here on
before = resident()
blocks = [torch.ones(2**20) for _ in range(40)]
del blocks[::2]
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
@pytest.mark.parametrize("applied", [True, False])
def test_freed_blocks_go_back_to_the_system(run_child, applied):
    held = int(run_child(CODE.format(applied=applied))) / 2**22
    assert held == pytest.approx(20 if applied else 40, abs=2)
