"""The machine of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

QUIET = """
import logging
import {module}
{call}
assert logging.getLogger("lightning_fabric").level == logging.ERROR, logging.getLogger("lightning_fabric").level
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "call"),
    [("bisam.experiments.runs.machine", "{module}.Machine().fabric()"), ("bisam.experiments.training.train", "")],
    ids=["command", "process of a device"],
)
def test_fabric_is_quiet(module, call):
    """Importing Lightning sets the level of its logger to INFO; each process would print advice."""
    code = QUIET.format(module=module, call=call.format(module=module))
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity of processes")
def test_threads_and_slots_are_those_of_the_cores_that_the_process_may_use():
    """In a process of its own, because both settings are those of the process."""
    code = (
        "import os, torch; from bisam.experiments.runs.machine import Machine, cores, threads; "
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); threads(1); "
        "print(cores(), Machine().slots, torch.get_num_threads())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "1 1 1\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """By count of page faults, in a process of its own: blocks of 20 MB are allocated and freed 20 times."""
    code = (
        "import resource, torch; from bisam.experiments.runs.machine import keep_freed_memory; "
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt; torch.set_num_threads(1); "
        "kept = keep_freed_memory(); torch.ones(5_000_000); before = faults(); "
        "sum(torch.ones(5_000_000).numel() for _ in range(20)); print(kept, faults() - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    kept, faults = found.split()
    assert kept == "True"
    assert int(faults) < 2 * 4882  # the pages of two blocks, of 20
