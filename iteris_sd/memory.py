"""Fit the model into the memory there is: what waits in main memory, what is done in pieces, and when it ran out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

WORK = 2 * 1024**3  # what one 512 px picture under guidance needs beside the weights, with room for a merge


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


def size(pipeline: StableDiffusionPipeline) -> int:
    """Bytes of all weights of a pipeline."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


def placed(pipeline: StableDiffusionPipeline, device: torch.device) -> Plan:
    """Put a pipeline on a device, as its free memory allows; main memory is taken as it is."""
    pipeline.set_progress_bar_config(disable=True)
    if device.type != "cuda":
        pipeline.to(device)
        return Plan()
    free, _ = torch.cuda.mem_get_info(device)
    chosen = plan(free, size(pipeline))
    if chosen.pieces:
        pipeline.enable_vae_tiling()
        pipeline.enable_attention_slicing()
    pipeline.unet.to(memory_format=torch.channels_last)
    if chosen.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return chosen


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def tidy() -> None:
    """Give back what a failed attempt held."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
