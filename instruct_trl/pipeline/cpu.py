"""Making a CPU run as fast as the machine allows: threads, and memory that is kept instead of returned and zeroed."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def use_cpu_well(threads: int | None = None) -> None:
    """Use all cores, and stop glibc from mapping, faulting in and unmapping every large tensor anew.

    Launchers set OMP_NUM_THREADS=1, which leaves the other cores idle. And each allocation above 32 MB, such as a
    batch's logits, costs a page fault and a zeroed page for every 4 kB: a quarter of a step's time on a quiet machine.

    Args:
        threads: of torch; None shares the cores among the processes of this machine.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // processes))
    if torch.accelerator.is_available() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 2**28)
