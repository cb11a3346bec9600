"""Results that are kept for the next time they are asked for, by what they were made of, within a bound on memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from iteris_sd import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from iteris_sd.backbone import Backbone
    from iteris_sd.concepts import Loaded
    from iteris_sd.recipe import MethodUse, Recipe

T = TypeVar("T")
_CONTENTS: WeakKeyDictionary[Loaded, list[Any]] = WeakKeyDictionary()  # hashing a large LoRA takes a second


class Shelf(Generic[T]):
    """A map that lets go of what was not asked for longest when it holds more than `most` bytes; threads share it."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._found: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> T | None:
        """What is kept under `key`, if it still is."""
        with self._lock:
            if key not in self._found:
                return None
            self._found.move_to_end(key)
            return self._found[key][0]

    def put(self, key: str, value: T, size: int) -> None:
        """Keep a value of `size` bytes; one larger than the whole bound is not kept."""
        with self._lock:
            self._held -= self._found.pop(key, (value, 0))[1]
            if size > self._most:
                return
            self._found[key] = value, size
            self._held += size
            while self._held > self._most:
                self._held -= self._found.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._found)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._found.clear()
            self._held = 0


def key_of_samples(
    backbone: Backbone, recipe: Recipe, picked: Sequence[Loaded], place: int, text_only: bool
) -> str:
    """What the calibration samples of the concept at `place` depend on.

    Also the tokens of all concepts, in order: samples are ids of tokens, and an id counts the tokens learned before;
    and a trigger may hold another concept's.
    """
    words = [_content(one)[1] for one in picked]
    seen = [_model(backbone), _concept(recipe, place, picked[place]), words, _calibration(recipe), text_only]
    return _digest("samples", seen)


def key_of_merge(
    backbone: Backbone, recipe: Recipe, picked: Sequence[Loaded], method: MethodUse, measured: bool
) -> str:
    """What a merge depends on: LoRAs and tokens by the SHA-256 of what is in them, weights, method, calibration."""
    from iteris_sd.merging import registry

    chosen = registry.find(method.name)
    concepts = [_concept(recipe, k, one) for k, one in enumerate(picked)]
    parameters = chosen.validate(method.parameters)
    fed = _calibration(recipe) if measured or chosen.needs != "none" else None
    return _digest("merge", [_model(backbone), concepts, method.name, parameters, fed, measured])


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """How much memory tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _model(backbone: Backbone) -> list[str]:
    return [backbone.base.name, backbone.base.source, str(backbone.dtype), backbone.device.type]


def _concept(recipe: Recipe, place: int, one: Loaded) -> list[Any]:
    use = recipe.concepts[place].model_dump(exclude={"name"})
    return [*_content(one), one.concept.trigger, one.concept.class_noun, use]


def _content(one: Loaded) -> list[Any]:
    """The SHA-256 of each factor and token, of what was read, since a file's settings may stand in another."""
    found = _CONTENTS.get(one)
    if found is None:
        layers = {name: [_bytes(factor) for factor in (a.down, a.up)] for name, a in one.lora.items()}
        tokens = [[token, _bytes(vectors)] for token, vectors in one.tokens.items()]
        found = _CONTENTS[one] = [layers, tokens]
    return found


def _calibration(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(include={"calibration", "guidance", "size", "clip_skip"})


def _bytes(tensor: Tensor) -> str:
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(what: str, seen: Sequence[Any] | Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([__version__, what, seen], sort_keys=True).encode()).hexdigest()
