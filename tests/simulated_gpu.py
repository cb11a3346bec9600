"""A GPU that is none: its tensors say ``cuda:0``, refuse what a GPU's would refuse, and compute on the CPU.

It proves which device every tensor is on, not how fast anything is, nor how a GPU rounds: what an operation is given
must be on one device, and only moves, and indices, may cross. `installed` puts it in place of the GPU that torch looks
for, in threads that begin meanwhile, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_MOVES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
# They choose a kernel by the device they see, before their parts come to be dispatched.
_CHOOSING = (nn.functional.scaled_dot_product_attention, nn.functional.batch_norm)


class OnGPU(Tensor):
    """A tensor of the simulated GPU; `host` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGPU:
        made: OnGPU = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
        )
        made.host = host
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.host!r})"

    @property  # type: ignore[override]
    def data(self) -> OnGPU:
        """The tensor without its history; what it is set to takes its place."""
        return OnGPU(self.host.detach())

    @data.setter
    def data(self, other: OnGPU) -> None:
        self.host = other.host

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func in _CHOOSING:
            _require_one_device(func, tree_leaves((args, kwargs)))
            return OnGPU(func(*tree_map(_host, args), **tree_map(_host, kwargs)))
        if func is Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        return _run(func, args, kwargs or {})


def _host(value: Any) -> Any:
    return value.host if isinstance(value, OnGPU) else value


def _device(value: Any) -> Any:
    return OnGPU(value) if isinstance(value, Tensor) and not isinstance(value, OnGPU) else value


def _on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _require_one_device(func: Any, leaves: Sequence[Any]) -> None:
    """Numbers may come from the CPU, arrays may not."""
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    here = [t for t in tensors if isinstance(t, OnGPU)]
    if here and any(t.ndim for t in tensors if not isinstance(t, OnGPU)):
        raise RuntimeError(f"Expected all tensors of {func} to be on the same device, found cuda:0 and cpu")


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an operation on the CPU, and put the result where a GPU would."""
    leaves = tree_leaves((args, kwargs))
    if func in _INDEXING:
        _require_one_device(func, [args[0], *args[2:]])
        if not isinstance(args[0], OnGPU) and any(isinstance(i, OnGPU) for i in args[1]):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
    elif func not in _MOVES:
        _require_one_device(func, leaves)
    target = kwargs.get("device")
    if target is not None:
        there = _on_gpu(target)
    elif func is _aten.copy_.default:
        there = isinstance(args[0], OnGPU)
    else:
        there = any(isinstance(leaf, OnGPU) for leaf in leaves)
    asked = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
    result = func(*tree_map(_host, args), **tree_map(_host, asked))
    if not there:
        return result
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_device, result))


class _Making(TorchDispatchMode):
    """Makes tensors on the simulated GPU where that is asked for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if _on_gpu(kwargs.get("device")) or any(isinstance(t, OnGPU) for t in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Numbers(TorchFunctionMode):
    """`torch.tensor` of plain numbers, which asks no mode of operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is torch.tensor and _on_gpu(kwargs.get("device")):
            return OnGPU(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def installed(free: int = 80 * 1024**3) -> Iterator[None]:
    """Within the block torch finds one GPU, with so many bytes free."""
    run = threading.Thread.run

    def followed(self: threading.Thread) -> None:
        with _Making(), _Numbers():
            run(self)

    there: dict[str, Callable[..., object]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (free, free),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "a simulated GPU",
    }
    torch._C._ensureCUDADeviceGuardSet()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # as parameters of another class need
    try:
        with ExitStack() as stack:
            for name, told in there.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, told))
            stack.enter_context(mock.patch.object(threading.Thread, "run", followed))
            stack.enter_context(_Making())
            stack.enter_context(_Numbers())
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
