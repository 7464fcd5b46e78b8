"""How much memory is free, and what becomes of memory that was."""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

_UNKNOWN_MEMORY = 2 * 2**30  # where the system does not say
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device; for the CPU those of the container, if it is in one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    with suppress(OSError, ValueError, IndexError):
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
        free.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        given_back = int(cached[1]) if cached else 0  # files in the page cache make room when it is wanted
        free.append(int((group / "memory.max").read_text()) - used + given_back)
    if not free and hasattr(os, "sysconf"):  # macOS says only what there is
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(min(free, default=_UNKNOWN_MEMORY), 0)


def keep_freed() -> None:
    """Memory this process frees stays with it, for the tensors of the next step.

    glibc gives large pieces back to the system at once, which then zeroes and maps every page of them anew,
    in every step. Forked data workers inherit it. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows has no such library at all
        return
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_MMAP_MAX, 0)
