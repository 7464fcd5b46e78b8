"""How much memory is free."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import torch

_UNKNOWN_MEMORY = 2 * 2**30  # where the system does not say


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
