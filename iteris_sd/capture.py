"""Layer inputs of the single models and of the merged one, captured side by side on any ``nn.Module``.

The samples go through the model in micro-batches, each of one concept. One forward carries the samples of a
micro-batch twice, along dim 0: the first half also gets that concept's LoRA at every layer it touches, the other half
the merged adapter. So X and X̃ reach a layer in the same call, paired row by row; only their moments are kept.

| symbol | shape   | meaning                                                                |
|--------|---------|------------------------------------------------------------------------|
| X_n    | (m, in) | inputs reaching a layer in base + LoRA n, on concept n's samples       |
| X̃_n    | (m, in) | inputs reaching it in the merged model, on the same samples            |

Inputs of a convolution are patches, as many per sample as its output has places. A *site* is where layers are fed by
the same tensor (q, k and v; all cross-attention K/V of a U-Net) and look at it alike: they share one set of moments.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import local
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from iteris_sd import layers
from iteris_sd.errors import UserError
from iteris_sd.lora import LowRank
from iteris_sd.merging.moments import Moments, Sums
from iteris_sd.spilling import Frontier

Part = tuple[int, slice]


@dataclass(frozen=True)
class Samples:
    """The samples of N concepts, and how to run the model on them.

    ``rows[n]``: how many there are of concept n. ``feed(parts)`` runs the model on parts of them, concatenated along
    dim 0 in that order; a part is a concept and a slice of its samples. The same part may occur twice, and must then
    get the same samples twice (same noise, same timesteps). What a sample is, only ``feed`` knows. It may return the
    inputs of layers that nothing follows, by name: they are looked at, and no outputs are made of them. A sweep needs a
    part's whole way in one forward; otherwise ``feed`` may run the model several times, each with all rows.
    ``micro_batch``: at most so many samples go through the model at once, twice; None for a concept's all.
    ``positions``: of a layer's inputs with more positions per sample, only so many are looked at, the same random ones
    of X and X̃, of all samples and at each time; None for all. ``kept[n]``: the positions of concept n's samples that
    are looked at, (rows, positions) bool. There may be one group of samples more than concepts: captions of nobody's,
    which run through the base model.
    """

    rows: tuple[int, ...]
    feed: Callable[[Sequence[Part]], Mapping[str, Tensor] | None]
    micro_batch: int | None = None
    positions: int | None = None
    kept: Sequence[Tensor] | None = None

    def batches(self) -> "list[MicroBatch]":
        """All samples, cut up; the cuts depend on nothing but ``rows`` and ``micro_batch``."""
        found = []
        for n, count in enumerate(self.rows):
            step = self.micro_batch or count
            found += [MicroBatch(n, slice(k, min(k + step, count))) for k in range(0, count, step)]
        return found


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples of one concept that go through the model together."""

    concept: int
    part: slice
    _sites: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    @property
    def size(self) -> int:
        """How many samples."""
        return int(self.part.stop - self.part.start)

    def site(self, x: Tensor, layer: nn.Module) -> "Site | None":
        """The site at which the living tensor ``x`` has been seen by a layer that looks at it as this one does."""
        found: Site | None = self._sites.get(x, {}).get((_version(x), layers.geometry(layer)))
        return found

    def saw(self, x: Tensor, layer: nn.Module, site: "Site") -> None:
        """Remember that ``x`` belongs to ``site`` for as long as it lives."""
        self._sites.setdefault(x, {})[_version(x), layers.geometry(layer)] = site


def _version(x: Tensor) -> object:
    """A tensor changed in place is another input; whether one of ``torch.inference_mode`` was, nobody can tell."""
    return object() if x.is_inference() else x._version


@dataclass(eq=False)
class Site:
    """Moments of the inputs that one or more layers share, by concept; ``first`` is the layer met first."""

    first: str
    exact: bool = True
    sums: dict[int, Sums] = field(default_factory=dict)
    seen: set[MicroBatch] = field(default_factory=set)

    def add(self, batch: MicroBatch, X: Tensor, X_merged: Tensor | None, last: bool) -> None:
        """Add the inputs of a micro-batch; ``last``: it is its concept's last one."""
        sums = self.sums.setdefault(batch.concept, Sums(self.exact))
        sums.add(X, X_merged)
        if last:
            sums.settle()
        self.seen.add(batch)

    @cached_property
    def moments(self) -> dict[int, Moments]:
        """The moments of each concept, when all inputs have been added."""
        return {n: sums.total() for n, sums in self.sums.items()}

    def of(self, concepts: Sequence[int]) -> tuple[Moments, ...]:
        """The moments of some concepts."""
        return tuple(self.moments[n] for n in concepts)


Arrive = Callable[[str, MicroBatch], None]


class Capture:
    """The base layers with hooks, the single LoRAs, and what has been captured so far.

    ``merged``: the merged adapters known so far; None while there are none and X̃ = X. ``arrive(name, batch)`` is
    called for every layer of ``wanted`` when its inputs have been added to its site and before its output is made, and
    may thus still change ``merged[name]``. ``frontier`` watches what the micro-batches hold. ``exact``: see
    `Moments.of`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        loras: Sequence[Mapping[str, LowRank]],
        wanted: frozenset[str],
        samples: Samples,
        merged: Mapping[str, LowRank] | None,
        arrive: Arrive | None = None,
        frontier: Frontier | None = None,
        exact: bool = True,
    ) -> None:
        self._modules, self._loras, self._wanted = modules, loras, wanted
        self._samples, self._merged, self._arrive = samples, merged, arrive
        self._frontier, self._exact = frontier, exact
        self._here = local()  # each micro-batch may run in a thread of its own
        self._placed: MutableMapping[LowRank, LowRank] = WeakKeyDictionary()  # adapters where their layer is
        # While layers are solved as their inputs arrive, a site lives as long as the tensors it is made of.
        self.sites: MutableMapping[str, Site] = {} if arrive is None else WeakValueDictionary()

    def run(self, batch: MicroBatch) -> None:
        """Run a micro-batch of the samples through the model."""
        self._here.batch, self._here.muted = batch, nullcontext
        part = (batch.concept, batch.part)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in ("cpu", "cuda"):  # the caller's does not reach threads: no micro-batch has any
                stack.enter_context(torch.autocast(kind, enabled=False))
            if self._frontier is not None:
                self._here.muted = stack.enter_context(self._frontier.watched(batch)).muted
            unread = self._samples.feed([part] if self._merged is None else [part, part])
            for name, x in (unread or {}).items():
                self._meet(name, x, batch)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the block the model's layers are watched and adapted; afterwards the model is as before."""
        touched = dict.fromkeys(name for lora in self._loras for name in lora)
        handles = [self._modules[n].register_forward_hook(partial(self._hook, n)) for n in touched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._placed.clear()

    @torch.compiler.disable  # where samples run in a compiled model, this is not to be compiled with it
    def _hook(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        batch: MicroBatch = self._here.batch
        x, size = args[0], batch.size
        self._meet(name, x, batch)
        self._add(module, output[:size], x[:size], self._own(batch).get(name))
        if self._merged is not None:
            self._add(module, output[size:], x[size:], self._merged.get(name))
        return output

    def _add(self, layer: nn.Module, output: Tensor, x: Tensor, adapter: LowRank | None) -> None:
        """Add what an adapter makes of ``x`` to some rows of a layer's output."""
        if adapter is None:
            return
        placed = self._placed.get(adapter)
        if placed is None:
            with self._here.muted():  # it outlives the micro-batch
                placed = self._placed[adapter] = adapter.to(x.device, x.dtype)
        output += layers.applied(layer, placed, x)

    def _meet(self, name: str, x: Tensor, batch: MicroBatch) -> None:
        """Inputs have come to a layer. What is made of them here outlives the micro-batch."""
        if self._frontier is not None:
            self._frontier.restore([x])
        # What is made of inputs is added up later, also where samples run in inference mode.
        with self._here.muted(), torch.inference_mode(False), torch.no_grad():
            self._look_at(name, x, batch)

    def _own(self, batch: MicroBatch) -> Mapping[str, LowRank]:
        """The LoRA of a micro-batch's concept; none for samples of nobody's."""
        return self._loras[batch.concept] if batch.concept < len(self._loras) else {}

    def _chosen(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """The inputs of a micro-batch's samples that are looked at, of x (rows, …, in)."""
        if self._samples.kept is not None:
            return x[self._samples.kept[batch.concept][batch.part].to(x.device)]
        return _thinned(x, self._samples.positions)

    def _look_at(self, name: str, x: Tensor, batch: MicroBatch) -> None:
        rows = batch.size if self._merged is None else 2 * batch.size
        if len(x) != rows:
            raise UserError(
                f"{name} was given {len(x)} rows where the samples have {rows}; it cannot be merged."
            )
        if name in self._wanted:
            self._take(name, x, batch)
            if self._arrive is not None:
                self._arrive(name, batch)

    def _take(self, name: str, x: Tensor, batch: MicroBatch) -> None:
        """Add the inputs of a layer to its site, unless another layer brought them already."""
        layer = self._modules[name]
        known = batch.site(x, layer)
        site = self.sites.get(name) or known or Site(name, self._exact)
        self.sites[name] = site
        if known is None and site.first == name:
            looked_at = layers.rows(layer, x)
            X = self._chosen(looked_at[: batch.size], batch)
            X_merged = None if self._merged is None else self._chosen(looked_at[batch.size :], batch)
            last = batch.part.stop == self._samples.rows[batch.concept]
            site.add(batch, X, X_merged, last)
            batch.saw(x, layer, site)
        elif known is not site:
            raise UserError(
                f"The samples reach {name} by another way than those before; they cannot be merged together."
            )


def _thinned(x: Tensor, most: int | None) -> Tensor:
    """x (rows, …, in) as (rows, positions, in) with ``most`` positions, drawn once and for all for their number."""
    if most is None or x.ndim < 3:
        return x
    flat = x.flatten(1, -2)
    count = flat.shape[1]
    if count <= most:
        return flat
    picks = torch.randperm(count, generator=torch.Generator().manual_seed(count))[:most].sort().values
    return flat[:, picks.to(x.device)]
