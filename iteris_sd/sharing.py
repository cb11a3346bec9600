"""Who takes part in which layer when several LoRAs are merged, and which layers the method has to solve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from iteris_sd.lora import TARGETS, LoRA, LowRank
from iteris_sd.merging import registry


@dataclass(frozen=True, eq=False)
class Shares:
    """The layers of several LoRAs, shared out.

    ``absent``: what a LoRA that does not touch a layer, or was not trained there and holds zeros, does there: "skip",
    it takes no part; "zero", it takes part with ΔW = 0. ``targets``: the layers to be solved for, a key of
    ``lora.TARGETS``.
    """

    loras: Sequence[LoRA]
    absent: Literal["skip", "zero"] = "skip"
    targets: str = "all"

    @cached_property
    def participants(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> the concepts that take part in it, in order of first appearance."""
        names = dict.fromkeys(name for lora in self.loras for name in lora)
        everyone = tuple(range(len(self.loras)))
        if self.absent == "zero":
            return dict.fromkeys(names, everyone)
        holders = {name: tuple(n for n in everyone if name in self.loras[n]) for name in names}
        return {
            name: tuple(n for n in who if name in self._changed[n]) or who for name, who in holders.items()
        }

    @cached_property
    def contested(self) -> frozenset[str]:
        """The layers that the method has to solve: those among the targets with several participants."""
        wanted = TARGETS[self.targets]
        return frozenset(
            name for name, who in self.participants.items() if len(who) > 1 and wanted.fullmatch(name)
        )

    def adapters(self, name: str) -> list[LowRank]:
        """The participants' adapters at a layer; of rank 0 where a LoRA does not touch it."""
        who = self.participants[name]
        nothing = LowRank.nothing(next(lora[name] for lora in self.loras if name in lora))
        live = [n for n in who if name in self._changed[n]] or who
        return [self.loras[n].get(name, nothing) if n in live else nothing for n in who]

    @cached_property
    def _changed(self) -> tuple[frozenset[str], ...]:
        """The layers at which each LoRA does anything."""
        return tuple(
            frozenset(name for name, one in lora.items() if bool(one.up.any()) and bool(one.down.any()))
            for lora in self.loras
        )


def shares(loras: Sequence[LoRA], method: registry.Method, settings: Mapping[str, Any]) -> Shares:
    """How a method with these validated settings shares the layers out."""
    return Shares(loras, settings.get("absent", "skip"), settings.get("targets", method.targets))
