"""The machine that the figures are from: its GEMM rate and memory bandwidth, and how much memory there is and was used.

What the system does not say is None; nothing here fails for the lack of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from .turns import Contestant, Timing

_R = TypeVar("_R")

GEMM, READ, COPY = "gemm_flops_per_s", "read_bytes_per_s", "copy_bytes_per_s"
_SPARE = 0.9  # of the memory that is available; the rest is left to everything else
_VALUE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


class Machine:
    """What rates are measured with: one large float32 GEMM, the sum of a tensor beyond any cache, and a copy of it."""

    def __init__(self, gemm_size: int = 2048, nbytes: int = 2**28) -> None:
        self.square = torch.rand(gemm_size, gemm_size)
        self.source = torch.rand(nbytes // 4)
        self.target = torch.empty_like(self.source)

    def contestants(self, *names: str) -> list[Contestant]:
        """The measurements asked for, to be timed by turns with others."""
        steps: dict[str, Callable[[], object]] = {
            GEMM: lambda: torch.mm(self.square, self.square),
            READ: self.source.sum,
            COPY: lambda: self.target.copy_(self.source),
        }
        return [Contestant(name, steps[name]) for name in names]

    def rates(self, timings: dict[str, Timing]) -> dict[str, float]:
        """FLOP/s of the GEMM and bytes/s of reading and copying, of those that were timed."""
        work = {GEMM: 2 * len(self.square) ** 3, READ: 4 * len(self.source), COPY: 2 * 4 * len(self.source)}
        return {name: amount / timings[name].seconds for name, amount in work.items() if name in timings}


def describe() -> dict[str, str | int | float | None]:
    """Processor, cores, memory in bytes, versions, and the load: processes that were running in the last minute."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _kilobytes("/proc/meminfo").get("MemTotal"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _kilobytes(path: str) -> dict[str, int]:
    """The sizes that a file of /proc states, in bytes."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    return {name: 1024 * int(value) for name, value in _VALUE.findall(text)}


def available_bytes() -> int | None:
    """Memory that may still be used without swapping; in a control group with a limit, what that leaves."""
    found = [_kilobytes("/proc/meminfo").get("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used)
    known = [size for size in found if size is not None]
    return int(_SPARE * min(known)) if known else None


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now."""
    return _kilobytes("/proc/self/status").get("VmRSS")


def _return_freed_memory() -> None:
    """Give back what the allocator keeps for later, or the next call's memory would not show (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def settled_bytes() -> int | None:
    """`resident_bytes` without what the allocator keeps for later."""
    _return_freed_memory()
    return resident_bytes()


def peak_memory(work: Callable[[], _R]) -> tuple[_R, int | None]:
    """The result of a call, and the most memory of this process that was in RAM while it ran."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    except OSError:
        return work(), None
    return work(), _kilobytes("/proc/self/status").get("VmHWM")


def working_memory(work: Callable[[], _R]) -> tuple[_R, int | None]:
    """The result of a call, and by how many bytes resident memory grew at most while it ran, the result included."""
    before = settled_bytes()
    result, peak = peak_memory(work)
    return result, None if before is None or peak is None else max(0, peak - before)


@contextlib.contextmanager
def memory_guard() -> Iterator[None]:
    """Let a block that asks for more memory than is available fail, where the system can, instead of being killed.

    Raises:
        MemoryError: the block asked for too much.
    """
    available, mapped = available_bytes(), _kilobytes("/proc/self/status").get("VmSize")
    limited = _address_space(mapped + available) if available and mapped else contextlib.nullcontext()
    try:
        with limited:
            yield
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise MemoryError(str(error)) from error


@contextlib.contextmanager
def _address_space(nbytes: int) -> Iterator[None]:
    import resource  # not on Windows, which has no /proc either

    before = resource.getrlimit(resource.RLIMIT_AS)
    hard = before[1]
    soft = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
