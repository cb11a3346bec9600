"""Fit the model into the memory there is: what waits in main memory, what is done in pieces, and when it ran out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

WORK = 2 * 1024**3  # what one 512 px picture under guidance needs beside the weights, with room for a merge
MORE = 4 * 1024**3  # beside that, for so many bytes four more pictures are drawn in one batch, in halves
# How drivers and libraries say it, in lower case; cuDNN finds no engine when there is no room for any one's workspace.
_RAN_OUT = ("out of memory", "enough memory", "allocate memory", "alloc_failed", "unable to find an engine")


@dataclass(frozen=True)
class Plan:
    """`offload`: parts wait in main memory and come to the device when they are needed; `pieces`: pictures are decoded
    in tiles, and attention is done a few heads at a time."""

    offload: bool = False
    pieces: bool = False


def plan(free: int, weights: int) -> Plan:
    """What `free` bytes of a device's memory allow, for a model of so many bytes."""
    room = free - weights
    return Plan(offload=room < WORK // 2, pieces=room < WORK)


def free(device: torch.device) -> int:
    """Bytes of a GPU's memory that can still be had, those included that torch holds and nobody uses."""
    there, _ = torch.cuda.mem_get_info(device)
    return there + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def size(pipeline: StableDiffusionPipeline) -> int:
    """Bytes of all weights of a pipeline."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


def place(pipeline: StableDiffusionPipeline, device: torch.device) -> None:
    """Put a pipeline on a device, as its free memory allows; main memory is taken as it is."""
    pipeline.set_progress_bar_config(disable=True)
    if device.type != "cuda":
        pipeline.to(device)
        return
    chosen = plan(free(device), size(pipeline))
    if chosen.pieces:
        pipeline.vae.enable_tiling()
        pipeline.enable_attention_slicing()
    pipeline.unet.to(memory_format=torch.channels_last)
    if chosen.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def waits(part: nn.Module) -> bool:
    """Whether a part of a model waits in main memory and comes to the device when it is needed."""
    return hasattr(part, "_hf_hook")


@contextmanager
def kept_together(pipeline: StableDiffusionPipeline) -> Iterator[None]:
    """Within the block text encoder and U-Net are on the device at once, where parts of the model wait elsewhere.

    A merge has samples waiting in both. Only the two do not drive each other out; another part still does.
    """
    parts = (pipeline.text_encoder, pipeline.unet)
    hooks = [part._hf_hook for part in parts if waits(part)]
    before = [hook.prev_module_hook for hook in hooks]
    try:
        for hook in hooks:
            hook.prev_module_hook = None
        for part, hook in zip(parts, hooks, strict=False):
            part.to(hook.execution_device)
        yield
    finally:
        for hook, other in zip(hooks, before, strict=True):
            hook.prev_module_hook = other


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _RAN_OUT)


def enlarged(unet: nn.Module) -> int:
    """How many times as many pictures as four of 512 px may be drawn in one batch where the U-Net is: 1 to 4.

    More at once would not be drawn faster: so many rows keep a large GPU busy.
    """
    weight = next(unet.parameters())
    if weight.device.type != "cuda" or waits(unet):
        return 1
    return min(4, 1 + max(0, free(weight.device) - WORK) // (MORE * weight.element_size() // 2))


def tidy() -> None:
    """Give back what a failed attempt held, in frames that hold each other as well."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
