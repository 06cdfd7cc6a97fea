"""What the run asks of the machine. Run: python -m pytest tests/training/hardware/test_machine.py"""

import subprocess
import sys

import pytest

HOLES = """
import resource
import torch
from resilient_t5.training.hardware.machine import return_freed_memory_to_os

def resident_mib():
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20

if {steady}:
    return_freed_memory_to_os()
torch.ones(7 << 20)  # 28 MiB, freed: from now on glibc keeps what is smaller
before_mib, large, small = resident_mib(), [], []
for _ in range(20):
    large.append(torch.ones(1 << 20))  # 4 MiB
    small.append(torch.ones(1 << 14))  # 64 KiB that stay allocated and pin the heap
del large
print(resident_mib() - before_mib - 20 / 16)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap, read from /proc")
def test_freed_tensors_stay_in_the_heap_unless_it_returns_them_to_the_os():
    """80 MiB of tensors freed between small ones that stay: all of it stays resident, or none."""

    def resident_increase_mib(steady):
        program = HOLES.format(steady=steady)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert resident_increase_mib(False) > 60
    assert abs(resident_increase_mib(True)) < 8
