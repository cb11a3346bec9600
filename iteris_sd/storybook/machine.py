"""What this machine offers to training: a device, a precision that pays, attention that suits small pictures."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

Precision = Literal["auto", "fp32", "bf16"]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Machine:
    """Where and how a stage computes; weights and optimizer stay in float32 whatever the precision."""

    device: torch.device
    bf16: bool = False
    compiled: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Forward passes in bfloat16 where that pays.

        Without autocast's cache: it would keep the weights of the first step for as long as the block lasts.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)


def here(precision: Precision = "auto", compiled: bool = False) -> Machine:
    """This machine: a GPU if there is one; bfloat16 if asked for, or if matrix products are much faster in it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = precision == "bf16" or (precision == "auto" and _bf16_pays(device))
    return Machine(device, bf16, compiled)


def _bf16_pays(device: torch.device) -> bool:
    """Whether a matrix product in bfloat16 takes less than half the time of one in float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(1024, 1024, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            float((square @ square)[0, 0])  # reading one number waits for the device
            best = min(best, time.perf_counter() - began)
        seconds[dtype] = best
    return seconds[torch.bfloat16] < 0.5 * seconds[torch.float32]


def channels_last(module: M) -> M:
    """The module, its convolutions' weights laid out as they are computed fastest; in place."""
    to: Any = module.to  # PyTorch's types know this word from 2.14 on
    to(memory_format=torch.channels_last)
    return module


def suit(unet: UNet2DConditionModel, machine: Machine) -> UNet2DConditionModel:
    """Plain matrix products for attention on a CPU: over a few dozen tokens they are several times faster."""
    if machine.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    return unet
