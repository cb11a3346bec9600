"""Why a merge came out as it did: what each LoRA touches, how each layer was merged, how well that serves the concepts,
and what it cost. No pictures are drawn for it.

Torch loads only when `explain` runs, so a page can show an `Explanation` from its plain values.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from iteris_sd import diagnostics, limits
from iteris_sd.errors import MemoryShort
from iteris_sd.events import Event, MergeDone, Progress
from iteris_sd.merging import registry
from iteris_sd.recipe import Recipe, title

if TYPE_CHECKING:
    from iteris_sd.calibration import Change, LayerReport, Merged
    from iteris_sd.concepts import Library
    from iteris_sd.lora import LoRA

T = TypeVar("T")


@dataclass(frozen=True)
class Touch:
    """What one concept's LoRA, at its weight, changes in one block: how many layers, at which ranks, and the ‖ΔW‖_F of
    them together."""

    concept: str
    block: str
    layers: int
    ranks: tuple[int, ...]
    norm: float


@dataclass(frozen=True)
class Calibrated:
    """How one method came by its layers; the four counts add up to all of them.

    ``solved``: from samples, of which it saw ``rows`` inputs at ``sites`` different places of the model. ``combined``:
    from the LoRAs alone. ``averaged``: not among the method's targets. ``kept``: touched by one LoRA only.
    ``left_out``: concept and reason -> in how many layers it took no part.
    """

    method: str
    solved: int
    combined: int
    averaged: int
    kept: int
    rows: int
    sites: int
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Served:
    """How well one method serves the concepts in the layers that several LoRAs touch, all methods measured alike.

    ``residual``, ``discrepancy``: means over layers, as `calibration.LayerReport` has them; None where no layer is
    shared. ``shares``: concept -> its share of Σ λₙ‖XₙΔWₙᵀ − X̃ₙΔWᵀ‖² (the paper's Fig. 3c).
    """

    method: str
    residual: float | None
    discrepancy: float | None
    shares: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What is known of the merges of a recipe.

    ``merged``, ``calibrated``: by method, IterIS, RegMean and linear first. ``changes``: of every iteration of
    Algorithm 1 as printed; empty where nothing is shared. ``layers``: how many the LoRAs touch together; ``shared``:
    those that several of them touch. ``seconds``: by stage, in order of appearance; merges that were ``remembered``
    took none.
    """

    recipe: Recipe
    concepts: tuple[str, ...]
    merged: Mapping[str, Merged]
    changes: tuple[Change, ...]
    touched: tuple[Touch, ...]
    calibrated: Mapping[str, Calibrated]
    layers: int
    shared: frozenset[str]
    seconds: Mapping[str, float]
    remembered: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One sentence on how much there is to merge at all."""
        if len(self.concepts) == 1:
            return "Only one concept is picked, so there is nothing to merge: its LoRA stays as it is."
        if not self.shared:
            return "No layer is touched by two of these LoRAs, so none has to be merged."
        several = "both" if len(self.concepts) == 2 else "several"
        count, rest = len(self.shared), self.layers - len(self.shared)
        if not rest:
            return f"All {count} layers are touched by {several} LoRAs and have to be merged."
        return (
            f"Of {self.layers} layers, {count} are touched by {several} LoRAs and have to be merged; "
            f"the other {rest} by one of them only."
        )

    @property
    def reports(self) -> dict[str, tuple[LayerReport, ...]]:
        """Method -> its reports of the shared layers, the only ones that all methods were measured at."""
        return {
            name: tuple(report for report in merged.reports if report.name in self.shared)
            for name, merged in self.merged.items()
        }

    @property
    def served(self) -> tuple[Served, ...]:
        """How well each method serves the concepts."""
        return tuple(_served(name, reports, self.concepts) for name, reports in self.reports.items())

    def figures(self, folder: Path, method: str = "iteris") -> dict[str, Path]:
        """Its figures, as `diagnostics.figures` draws them into `folder`."""
        return diagnostics.figures(self.reports, self.concepts, self.changes, folder, method)

    def described(self) -> dict[str, Any]:
        """All of it but the adapters as plain values, for JSON."""
        return {
            "concepts": list(self.concepts),
            "summary": self.summary,
            "layers": self.layers,
            "shared": len(self.shared),
            "methods": {name: title(name) for name in self.merged},
            "touched": [asdict(one) for one in self.touched],
            "calibrated": [asdict(one) for one in self.calibrated.values()],
            "served": [asdict(one) for one in self.served],
            "changes": [{"iteration": k, **asdict(one)} for k, one in enumerate(self.changes, start=1)],
            "seconds": dict(self.seconds),
            "remembered": list(self.remembered),
        }


def explain(recipe: Recipe, library: Library, iterations: int = 8) -> Generator[Event, None, Explanation]:
    """Merge a recipe's concepts by its own methods and by those that the paper compares, and measure all of them.

    IterIS runs once more as Algorithm 1 is printed, with so many `iterations`, for what each of them changes. At most
    `limits.MAX_METHODS` methods are looked at. The events are those of `merger.merge_all`. Raises UserError.
    """
    from iteris_sd import calibration, merger
    from iteris_sd.columns import weighted
    from iteris_sd.sharing import Shares

    clock, asked = _Clock(), _asked(recipe)
    own = asked.methods[0].parameters
    printed = _by(recipe, [{"name": "iteris", "parameters": {**own, "iterations": iterations}}])
    picked, merged = yield from clock.timed(merger.merge_all(asked, library, measured=True), asked)
    loras, concepts = weighted(recipe, picked), tuple(one.concept.name for one in picked)
    changes: tuple[Change, ...] = ()
    if calibration.contested(loras, "iteris", own):
        work = merger.merge_all(printed, library)
        with suppress(MemoryShort):  # it holds all moments at once; the sweep, which does not, has run
            _, again = yield from clock.timed(work, printed, f", {iterations} iterations")
            changes = again["iteris"].changes
    shares = Shares(loras)
    return Explanation(
        recipe,
        concepts,
        merged,
        changes,
        tuple(touch for name, lora in zip(concepts, loras, strict=True) for touch in touches(name, lora)),
        {name: calibrated(one, concepts) for name, one in merged.items()},
        len(shares.participants),
        shares.contested,
        clock.seconds,
        tuple(clock.remembered),
    )


def touches(concept: str, lora: LoRA) -> list[Touch]:
    """What a concept's LoRA changes, block by block: the text encoder, then the U-Net's blocks from its input on."""
    from iteris_sd.lora import LoRA

    blocks: dict[str, list[str]] = {}
    for name in sorted(lora):
        blocks.setdefault(diagnostics.block(name), []).append(name)
    return [
        _touch(concept, where, LoRA({name: lora[name] for name in names})) for where, names in blocks.items()
    ]


def _touch(concept: str, where: str, part: LoRA) -> Touch:
    from iteris_sd.lora import inner

    square = sum(max(0.0, inner(adapter, adapter).item()) for adapter in part.values())
    return Touch(concept, where, len(part), tuple(sorted({a.rank for a in part.values()})), square**0.5)


def calibrated(merged: Merged, concepts: Sequence[str]) -> Calibrated:
    """How a method came by its layers."""
    own = [report for report in merged.reports if report.method == merged.method]
    kept = sum(report.method == "kept" for report in merged.reports)
    samples = registry.find(merged.method).needs != "none"
    rows: dict[str, int] = {}
    for report in own:
        if samples and report.site is not None:
            rows[report.site] = max(report.rows, rows.get(report.site, 0))
    left_out = Counter(
        f"{concepts[n]}: {why}" for report in merged.reports for n, why in report.dropped.items()
    )
    return Calibrated(
        merged.method,
        solved=len(own) if samples else 0,
        combined=0 if samples else len(own),
        averaged=len(merged.reports) - len(own) - kept,
        kept=kept,
        rows=sum(rows.values()),
        sites=len(rows),
        left_out=dict(left_out),
    )


def _served(method: str, reports: Sequence[LayerReport], concepts: Sequence[str]) -> Served:
    residuals = [report.residual for report in reports if report.residual is not None]
    apart = [report.discrepancy for report in reports if report.discrepancy is not None]
    return Served(
        method,
        fmean(residuals) if residuals else None,
        fmean(apart) if apart else None,
        diagnostics.shares(reports, concepts),
    )


def _asked(recipe: Recipe) -> Recipe:
    """The recipe with the methods to compare first and its other ones after them."""
    own = {use.name: use.model_dump() for use in recipe.merging}
    names = dict.fromkeys((*diagnostics.COMPARED, *own))
    return _by(recipe, [own.get(name, {"name": name}) for name in names][: limits.MAX_METHODS])


def _by(recipe: Recipe, methods: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe by other methods; of one seed, since bounds on pictures do not matter where none is drawn."""
    return Recipe.of(recipe.model_dump() | {"methods": methods, "seeds": recipe.seeds[:1], "retention": 0})


class _Clock:
    """The seconds of each stage, and the methods whose merge was remembered."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.remembered: list[str] = []

    def timed(
        self, work: Generator[Event, None, T], recipe: Recipe, how: str = ""
    ) -> Generator[Event, None, T]:
        """Pass on events and the result; `how`: what is said after a method's name.

        Time counts for the stage last announced; after a merge, for the recipe's next one.
        """
        names = [use.name for use in recipe.methods]
        stage = "loading"
        with closing(work):
            while True:
                since = time.perf_counter()
                try:
                    event = next(work)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                finally:
                    self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - since
                if isinstance(event, Progress):
                    stage = _stage(event.stage, how)
                elif isinstance(event, MergeDone):
                    following = names[names.index(event.method) + 1 :] or names[-1:]
                    stage = f"merging by {title(following[0])}{how}"
                    self.remembered += [event.method + how] if event.remembered else []
                yield event


def _stage(words: str, how: str) -> str:
    """The stage that the words of a progress belong to: "merging by IterIS", "sampling", "measuring" …"""
    first, _, rest = words.partition(":")[0].partition(" ")
    return f"merging {rest}{how}" if first == "Merging" else first.lower()
