"""Seconds, peak memory and what the machine can do at best."""

from __future__ import annotations

import importlib.util
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iteris_sd import memory
from iteris_sd.errors import UserError


@dataclass(frozen=True)
class Rate:
    """Multiply-adds per second of a large matrix product, in float32 and float64."""

    single: float
    double: float


def rate(device: str) -> Rate:
    """The best of three products of two square matrices, after one that nobody counts."""
    side = 2048

    def best(dtype: torch.dtype) -> float:
        a, b = torch.randn(2, side, side, dtype=dtype, device=device)
        times = [seconds(lambda: a @ b, device)[0] for _ in range(4)]
        return side**3 / min(times[1:])

    return Rate(best(torch.float32), best(torch.float64))


def seconds(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """How long a piece of work takes, and its result."""
    _settle(device)
    since = time.perf_counter()
    result = work()
    _settle(device)
    return time.perf_counter() - since, result


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str = "cpu") -> str:
    """What the times were measured on, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_bytes(prepare: Callable[[], Any], work: Callable[[Any], Any]) -> int:
    """Peak memory of ``work(prepare())`` above what was resident after ``prepare``, in a process of its own.

    On a GPU the GPU's memory, else the process's. Both must be functions of a module. Raises UserError where the
    system does not tell, and MemoryError where there is less than it takes.
    """
    _check_measurable()
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(prepare, work, send))
    child.start()
    send.close()
    try:
        found: int | None = receive.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the measured process ended with code {child.exitcode}") from None
    child.join()
    if found is None:
        raise MemoryError
    return found


def _check_measurable() -> None:
    if not torch.cuda.is_available() and importlib.util.find_spec("resource") is None:
        raise UserError(
            f"Peak memory of a process cannot be measured on {platform.system()}: Python has no module `resource` "
            "there; run the benchmark on Linux, on macOS, or where there is a GPU."
        )


def _measured(prepare: Callable[[], Any], work: Callable[[Any], Any], send: Any) -> None:
    given = prepare()
    before = _begin()
    try:
        work(given)
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        send.send(None)
        return
    send.send(_peak() - before)


def _begin() -> int:
    """Forget earlier peaks where that can be; what is resident now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    return _peak()  # earlier peaks hide ours there: what comes out is a lower bound


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
