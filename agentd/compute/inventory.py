"""CPUs, memory, disk and GPUs of this host. GPUs are read through NVML; a host without a driver has none."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import msgspec

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # the package tells that it became nvidia-ml-py, which it installs
    import pynvml


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as NVML reports it, memory in bytes."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    memory_free_bytes: int


class Inventory(msgspec.Struct, frozen=True):
    """What the host has: `cpus` that this process may use, memory and disk in bytes."""

    cpus: int
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...] = ()


def take(state: Path) -> Inventory:
    """The inventory now; `state` tells which file system is meant."""
    memory = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        memory[key] = int(rest.split()[0]) * 1024
    return Inventory(
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory["MemTotal"],
        memory_available_bytes=memory.get("MemAvailable", 0),
        disk_free_bytes=shutil.disk_usage(state).free,
        gpus=_gpus(),
    )


def _gpus() -> tuple[Gpu, ...]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(
                Gpu(
                    index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), memory.total, memory.free
                )
            )
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()
