"""torch.compile for drawing, where a person asks for it: minutes to begin with, then faster steps on a GPU.

Adapters that come and go as hooks would not be seen by a compiled model, or have it compiled anew each time. So every
layer of the U-Net gets one hook for good, which adds what lies in the layer's slot: what is compiled depends on which
slots are filled, and on ranks, but not on what the adapters hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iteris_sd.errors import UserError
from iteris_sd.layers import added
from iteris_sd.lora import LoRA, LowRank

BACKEND: Any = "inductor"
_GRAPHS = (
    64  # compiled at most, one for each set of slots that are filled and each shape; torch's own bound is 8
)
_RANKS = 16  # adapters are padded with zeros to multiples of this, so that fewer shapes are compiled


def wanted() -> bool:
    """Whether the U-Net is compiled for drawing: where ITERIS_SD_COMPILE says on. Raises UserError for other words."""
    told = os.environ.get("ITERIS_SD_COMPILE", "off")
    if told not in ("on", "off"):
        raise UserError(f"ITERIS_SD_COMPILE is {told!r}; choose on or off.")
    return told == "on"


class Compiled:
    """A U-Net compiled for drawing; the U-Net itself stays as it is, and can be called beside it.

    `layers`: canonical name -> layer. Called as the U-Net is.
    """

    def __init__(self, unet: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._layers = {name: layer for name, layer in layers.items() if name.startswith("unet.")}
        for layer in self._layers.values():
            _fill(layer, (), 0)
            layer.register_forward_hook(_adding)
        torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
        self._call: Callable[..., Any] = torch.compile(unet, backend=BACKEND)

    def __call__(self, *args: Any) -> Any:
        """The U-Net's prediction, with what lies in the slots. Raises UserError when it cannot be compiled."""
        try:
            return self._call(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).strip().partition("\n")[0]
            raise UserError(
                f"The model could not be compiled: {first}. Install a C++ compiler, or set ITERIS_SD_COMPILE=off."
            ) from error

    @contextmanager
    def filled(self, loras: Sequence[LoRA], rows: int = 0) -> Iterator[None]:
        """Within the block the U-Net is adapted: by one LoRA, or each block of `rows` rows by one of several.

        Slots are filled once: what is put in within another block takes its place.
        """
        names = [name for name in self._layers if any(name in lora for lora in loras)]
        before = {name: _content(self._layers[name]) for name in names}
        try:
            for name in names:
                layer = self._layers[name]
                own = [lora.get(name) for lora in loras]
                _fill(layer, tuple(None if a is None else _padded(a) for a in own), rows)
            yield
        finally:
            for name, content in before.items():
                _fill(self._layers[name], *content)


def _padded(adapter: LowRank) -> LowRank:
    return adapter.padded(-(-max(1, adapter.rank) // _RANKS) * _RANKS)


def _fill(layer: nn.Module, adapters: tuple[LowRank | None, ...], rows: int) -> None:
    layer.__dict__["slot"] = adapters, rows  # past nn.Module, which would look for parameters in it


def _content(layer: nn.Module) -> tuple[tuple[LowRank | None, ...], int]:
    found: tuple[tuple[LowRank | None, ...], int] = layer.slot  # type: ignore[assignment]  # a module's attribute
    return found


def _adding(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return added(layer, args[0], output, *_content(layer))
