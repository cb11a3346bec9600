"""The drive of every merging method, on any ``nn.Module``: capture layer inputs, solve, install.

*Sweep* (the default of methods that need X̃): a layer's X̃ depends only on layers upstream. So each micro-batch runs
until its inputs reach a layer that is not solved yet, and pauses there; when those of all have arrived, the layer is
solved, and their merged rows leave it through the solution: the fixed point of Algorithm 1 (arXiv 2411.15231) in one
forward of every sample. What lives meanwhile is each micro-batch's activations at the place where it waits, and the
moments of those inputs that still live. Pausing needs no knowledge of a model's blocks, and computes nothing twice;
storing the inputs of blocks instead would need both.

*Iterations*: Algorithm 1 as printed; a first solve with X̃ = X, then k times a
forward with the last result and a solve of all layers, micro-batch after micro-batch.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from statistics import median
from typing import Any

from torch import nn

from iteris_sd import layers, limits
from iteris_sd.capture import Capture, MicroBatch, Part, Samples, Site
from iteris_sd.errors import UserError
from iteris_sd.generators import finish
from iteris_sd.lora import LoRA, LowRank, inner, working_dtype
from iteris_sd.merging import registry
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, adaptive_weight, misses, weighted_sum
from iteris_sd.pausing import Pausable
from iteris_sd.sharing import Shares, shares
from iteris_sd.spilling import Frontier

__all__ = [
    "Change",
    "LayerReport",
    "Merged",
    "Part",
    "Progress",
    "Samples",
    "contested",
    "finish",
    "measure",
    "merge",
]


@dataclass(frozen=True)
class Progress:
    """``step`` of ``steps`` are done, layers in a sweep, else passes; ``stage`` says in words what comes next."""

    stage: str
    step: int
    steps: int


@dataclass(frozen=True)
class LayerReport:
    """How one layer was merged.

    ``participants``: concepts whose LoRA touches it, or whose samples speak for leaving it alone. ``method``: how it
    was merged; "kept" where only one LoRA touches it. ``site``: the first of the layers that are fed by the same tensor
    and thus share moments; ``rows``: how many inputs these were made of, over all participants. ``weights``: the λ of
    each participant. ``dropped``: participants left out, with the reason. ``residual``: Σλ‖XΔWₙᵀ − X̃ΔWᵀ‖² /
    Σλ‖XΔWₙᵀ‖². ``discrepancy``: ‖X̃ − X‖ / ‖X‖ (the paper's Fig. 3a). ``balance``: λₙ‖XₙΔWₙᵀ − X̃ₙΔWᵀ‖² of each
    participant (Fig. 3c). ``condition``: an estimate of the condition number of the system solved. ``change``:
    ‖ΔW − ΔW before‖ / ‖ΔW‖ in the last iteration. ``truncation``: ‖ΔW − ΔW_k‖ / ‖ΔW‖ where the method's own ΔW was cut
    to a rank k. Where a method looks at no merged model, and in a first solve, X̃ is taken to be X; with iterations it
    is that of the ΔW before the last one. What was not measured is None, or empty.
    """

    name: str
    participants: tuple[int, ...]
    method: str = "kept"
    site: str | None = None
    rows: int = 0
    weights: tuple[float, ...] = ()
    dropped: Mapping[int, str] = field(default_factory=dict)
    residual: float | None = None
    discrepancy: float | None = None
    balance: tuple[float, ...] = ()
    condition: float | None = None
    change: float | None = None
    truncation: float | None = None


@dataclass(frozen=True)
class Change:
    """How much one iteration changed the layers solved (the paper's Fig. 8): the median and the largest of
    ‖ΔW_k − ΔW_{k−1}‖ / ‖ΔW_k‖."""

    median: float
    largest: float


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged LoRA, how each layer came about, how often the model ran, and on how many samples at once.

    ``frontier``: the most bytes that the waiting micro-batches of a sweep held, those on disk included. ``changes``: of
    every iteration after the first solve; empty where there was none, as in a sweep.
    """

    lora: LoRA
    method: str
    parameters: Mapping[str, Any]
    reports: tuple[LayerReport, ...]
    passes: int
    micro_batch: int | None = None
    frontier: int = 0
    changes: tuple[Change, ...] = ()


def merge(
    modules: Mapping[str, nn.Module],
    loras: Sequence[LoRA],
    samples: Samples | None,
    method: str,
    parameters: Mapping[str, Any] | None = None,
) -> Generator[Progress, None, Merged]:
    """Merge ``loras`` into one by ``method``; yield progress, return the result.

    ``modules``: layer name -> the bare linear or convolutional layer of the base model, in eval mode and with no LoRA
    in it; every layer that a LoRA touches must be there. ``samples`` may be None for data-free methods. A layer with
    one participant keeps its LoRA, times ``registry.Method.alone``. Factors come back in the LoRAs' dtype, float32 at
    least.

    Between two yields runs no more than one micro-batch's way from one layer to the next, or one layer's solve. A sweep
    runs the model in threads of its own, one at a time; ``torch.autocast`` is off while samples run, whatever the
    caller has set.

    Raises UserError when a LoRA fits no layer, a parameter is wrong, the samples miss a layer, or a system is
    singular or not finite (naming the layer). The model is left as it was, also then.
    """
    chosen = registry.find(method)
    settings = chosen.validate(parameters or {})
    groups = len(loras) + (chosen.needs == "words")  # generic captions come after the concepts' own
    problem = _Problem(modules, shares(loras, chosen, settings), samples, groups, chosen.exact(settings))
    solve = _Solver(problem, chosen, settings)
    kept = problem.uncontested(partial(chosen.alone, settings))
    outcomes, passes, frontier = kept, 0, Frontier()
    changes: list[Change] = []
    if chosen.needs == "none":
        for k, name in enumerate(problem.order):
            yield Progress("merging layers", k, len(problem.order))
            outcomes[name] = solve(name, None)
    elif problem.contested:
        iterations = settings.get("iterations") if chosen.needs == "merged" else 0
        if iterations is None:
            found, passes = (yield from _sweep(problem, solve, kept, frontier)), 1
        else:
            tolerance = settings.get("tolerance", 0.0)
            found, changes = yield from _iterate(problem, solve, kept, iterations, tolerance)
            passes = 1 + len(changes)
        outcomes |= found
    ordered = {name: outcomes[name] for name in problem.participants}
    kernels = {name: kernel for lora in loras for name, kernel in lora.kernels.items()}
    lora = LoRA({name: outcome.adapter for name, outcome in ordered.items()}, kernels)
    size = samples.micro_batch if samples is not None and passes else None
    reports = tuple(outcome.report for outcome in ordered.values())
    return Merged(lora, chosen.name, settings, reports, passes, size, frontier.peak, tuple(changes))


def contested(loras: Sequence[LoRA], method: str, parameters: Mapping[str, Any]) -> frozenset[str]:
    """The layers that ``merge`` would have to find inputs of: none for a data-free method."""
    chosen = registry.find(method)
    settings = chosen.validate(parameters)
    if chosen.needs == "none":
        return frozenset()
    return shares(loras, chosen, settings).contested


def measuring(
    modules: Mapping[str, nn.Module],
    loras: Sequence[LoRA],
    merged: LoRA,
    samples: Samples,
    most_bytes: int = limits.MAX_MOMENT_BYTES,
) -> Generator[Progress, None, tuple[LayerReport, ...]]:
    """How well ``merged``, made by whatever method, serves every layer of several LoRAs: no solve.

    Layers are measured in groups whose moments fit into ``most_bytes``, a pass for each; yields after every
    micro-batch. Weights are those of eq. 8, so that methods can be compared. Products are made in the inputs' own
    dtype, float32 at least: nothing is solved here that would need more. Raises UserError as ``merge`` does.
    """
    problem = _Problem(modules, Shares(loras), samples, len(loras), exact=False)
    groups, reports = _groups(problem, most_bytes), dict[str, LayerReport]()
    for k, group in enumerate(groups):
        progress = Progress(f"pass {k + 1} of {len(groups)}", k, len(groups))
        sites = yield from _gathered(problem, merged, progress, group)
        for name, site in sites.items():
            nothing = LowRank.nothing(problem.adapters(name)[0])
            reports[name] = _measured(problem, name, site, merged.get(name, nothing))
    return tuple(reports.values())


def measure(
    modules: Mapping[str, nn.Module], loras: Sequence[LoRA], merged: LoRA, samples: Samples
) -> tuple[LayerReport, ...]:
    """``measuring`` run to its end."""
    return finish(measuring(modules, loras, merged, samples))


def _groups(problem: "_Problem", most_bytes: int) -> list[frozenset[str]]:
    """The contested layers in order, in groups whose moments take at most so many bytes, as if they shared none.

    A number takes twelve bytes: it is kept in float64, and in float32 what is being added to it.
    """
    groups: list[list[str]] = []
    room = 0
    for name in problem.order:
        width, who = problem.adapters(name)[0].shape[1], problem.participants[name]
        size = 3 * len(who) * width**2 * 12
        if not groups or size > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(name)
        room -= size
    return [frozenset(group) for group in groups]


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What became of one layer."""

    adapter: LowRank
    report: LayerReport

    def after(self, before: "_Outcome") -> "_Outcome":
        """The same outcome, with how much it changed."""
        apart = LowRank.concatenate([self.adapter, before.adapter.scaled(-1.0)])
        size = inner(self.adapter, self.adapter).item()
        change = (max(0.0, inner(apart, apart).item()) / size) ** 0.5 if size > 0 else 0.0
        return replace(self, report=replace(self.report, change=change))


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is given: the base layers, the LoRAs, the samples in so many groups, and whether their moments must be
    exact. UserError when they do not fit."""

    modules: Mapping[str, nn.Module]
    shares: Shares
    samples: Samples | None
    groups: int
    exact: bool = True

    def __post_init__(self) -> None:
        if not self.loras:
            raise UserError("There is nothing to merge: no LoRA was given.")
        if self.samples is not None and len(self.samples.rows) != self.groups:
            raise ValueError(
                f"{len(self.loras)} LoRAs need {self.groups} sample counts, got {self.samples.rows}"
            )
        for n, lora in enumerate(self.loras):
            layers.check_fit(lora, self.modules, f"LoRA {n + 1}")

    @property
    def loras(self) -> Sequence[LoRA]:
        """What is to be merged."""
        return self.shares.loras

    @property
    def participants(self) -> Mapping[str, tuple[int, ...]]:
        """Layer name -> the concepts that take part in it."""
        return self.shares.participants

    @property
    def contested(self) -> frozenset[str]:
        """The layers to solve."""
        return self.shares.contested

    @cached_property
    def order(self) -> list[str]:
        """The layers to solve, as the LoRAs name them."""
        return [name for name in self.participants if name in self.contested]

    def given_samples(self) -> Samples:
        """The samples; ValueError when there are none."""
        if self.samples is None or not all(self.samples.rows):
            raise ValueError("this method needs samples of every concept")
        return self.samples

    def capture(
        self,
        merged: Mapping[str, LowRank] | None,
        arrive: Callable[[str, MicroBatch], None] | None = None,
        frontier: Frontier | None = None,
        wanted: frozenset[str] | None = None,
    ) -> Capture:
        """A capture of the inputs of all contested layers, or of those ``wanted``."""
        return Capture(
            self.modules,
            self.loras,
            self.contested if wanted is None else wanted,
            self.given_samples(),
            merged,
            arrive,
            frontier,
            self.exact,
        )

    def adapters(self, name: str) -> list[LowRank]:
        """The participants' adapters at a layer."""
        return self.shares.adapters(name)

    def uncontested(self, alone: Callable[[int], float]) -> dict[str, _Outcome]:
        """The layers with one participant, which keep its LoRA, and those not among the targets, which are averaged.

        ``alone``: what a concept's LoRA is multiplied by where it is kept; with 0 it takes part in no average either.
        """
        return {
            name: self._averaged(name, who, alone) if len(who) > 1 else self._kept(name, who, alone(who[0]))
            for name, who in self.participants.items()
            if name not in self.contested
        }

    def _kept(self, name: str, who: tuple[int, ...], factor: float) -> _Outcome:
        kept = self.loras[who[0]][name]
        dropped = {} if factor else {who[0]: "it is multiplied by 0"}
        return _Outcome(
            kept if factor == 1.0 else kept.scaled(factor), LayerReport(name, who, dropped=dropped)
        )

    def _averaged(self, name: str, who: tuple[int, ...], alone: Callable[[int], float]) -> _Outcome:
        live = [alone(n) != 0 for n in who]
        found = weighted_sum(self.adapters(name), [one / max(1, sum(live)) for one in live])
        dropped = {who[i]: reason for i, reason in found.dropped.items()}
        return _Outcome(
            found.adapter, LayerReport(name, who, "linear", weights=found.weights, dropped=dropped)
        )


class _Solver:
    """A method bound to a problem and its settings: (layer name, site of its inputs) -> outcome."""

    def __init__(self, problem: _Problem, method: registry.Method, settings: Mapping[str, Any]) -> None:
        self._problem, self._method = problem, method
        self._layer = method.scoped(settings, "layer")
        self._concept = method.scoped(settings, "concept")
        for name, values in self._concept.items():
            if values is not None and len(values) != len(problem.loras):
                raise UserError(
                    f"{name} needs one number per concept, {len(problem.loras)}, not {len(values)}."
                )

    def __call__(self, name: str, site: Site | None) -> _Outcome:
        adapters, who = self._problem.adapters(name), self._problem.participants[name]
        moments = None if site is None else site.of(who)
        concept = {key: v if v is None else tuple(v[n] for n in who) for key, v in self._concept.items()}
        extra = self._extra(name, site)
        try:
            solution: Solution = self._method.solve(adapters, moments, **extra, **self._layer, **concept)
        except UserError as error:
            raise UserError(f"Layer {name} cannot be merged: {error}") from error
        dropped = {who[i]: reason for i, reason in solution.dropped.items()}
        report = LayerReport(
            name,
            who,
            self._method.name,
            weights=solution.weights,
            dropped=dropped,
            condition=solution.condition,
            truncation=solution.truncation,
        )
        if site is not None and moments is not None:
            found = misses(adapters, moments, solution.weights, solution.adapter)
            report = replace(
                report,
                site=site.first,
                rows=sum(m.count for m in moments),
                residual=found.residual,
                discrepancy=_discrepancy(moments),
                balance=found.balance,
            )
        merged = solution.adapter.to(adapters[0].down.device, working_dtype(adapters))
        return _Outcome(merged, report)

    def _extra(self, name: str, site: Site | None) -> dict[str, Any]:
        """What beside adapters and moments the method wants to know of a layer."""
        if self._method.needs_base:
            return {"base": layers.weight(self._problem.modules[name])}
        if self._method.needs == "words":
            assert site is not None
            return {"generic": site.moments[len(self._problem.loras)]}
        return {}


def _sweep(
    problem: _Problem, solve: _Solver, kept: Mapping[str, _Outcome], frontier: Frontier
) -> Generator[Progress, None, dict[str, _Outcome]]:
    """Solve every layer as its inputs arrive: the fixed point of Algorithm 1 in one forward of every sample."""
    outcomes: dict[str, _Outcome] = {}
    merged = {name: outcome.adapter for name, outcome in kept.items()}
    samples = problem.given_samples()
    batches = samples.batches()
    visited: set[tuple[str, MicroBatch]] = set()

    def arrive(name: str, batch: MicroBatch) -> None:
        if (name, batch) in visited:
            raise UserError(
                f"The samples reach {name} twice in one sweep; choose a number of iterations instead."
            )
        visited.add((name, batch))
        site = capture.sites[name]
        if name not in outcomes and len(site.seen) == len(batches):
            outcomes[name] = solve(name, site)
            merged[name] = outcomes[name].adapter
        while name not in outcomes:
            frontier.paused(batch)
            work[batch].pause()

    capture = problem.capture(merged, arrive, frontier)
    work = {batch: Pausable(partial(capture.run, batch)) for batch in batches}
    total = len(problem.contested)
    try:
        with capture.hooked():
            yield Progress("sweeping through the layers", 0, total)
            while not all(one.done for one in work.values()):
                before = len(outcomes), sum(one.done for one in work.values()), len(visited)
                for one in work.values():
                    one.resume()
                    yield Progress("sweeping through the layers", len(outcomes), total)
                if (len(outcomes), sum(one.done for one in work.values()), len(visited)) == before:
                    raise UserError("The samples of some concepts do not reach the layers that others reach.")
    finally:
        for one in work.values():
            one.close()
        frontier.close()
    _require_all(problem, outcomes, problem.contested)
    return outcomes


def _iterate(
    problem: _Problem, solve: _Solver, kept: Mapping[str, _Outcome], iterations: int, tolerance: float
) -> Generator[Progress, None, tuple[dict[str, _Outcome], list[Change]]]:
    """Algorithm 1 as printed: a first solve with X̃ = X, then at most ``iterations`` refinements; what each changed.

    Ends early once every layer's ΔW changes by less than ``tolerance`` of itself.
    """
    merged = {name: outcome.adapter for name, outcome in kept.items()}
    outcomes: dict[str, _Outcome] = {}
    changes: list[Change] = []
    for k in range(iterations + 1):
        progress = Progress(f"refinement {k} of {iterations}" if k else "first solve", k, iterations + 1)
        sites = yield from _gathered(problem, merged if k else None, progress)
        solved: dict[str, _Outcome] = {}
        for name, site in sites.items():
            yield progress
            solved[name] = solve(name, site)
        if k:
            solved = {name: outcome.after(outcomes[name]) for name, outcome in solved.items()}
            apart = [outcome.report.change or 0.0 for outcome in solved.values()]
            changes.append(Change(median(apart), max(apart)))
        outcomes = solved
        merged |= {name: outcome.adapter for name, outcome in outcomes.items()}
        if changes and changes[-1].largest < tolerance:
            break
    return outcomes, changes


def _gathered(
    problem: _Problem,
    merged: Mapping[str, LowRank] | None,
    progress: Progress,
    wanted: frozenset[str] | None = None,
) -> Generator[Progress, None, Mapping[str, Site]]:
    """The site of every contested layer, or of those ``wanted``, all samples in it; X̃ = X where ``merged`` is None."""
    wanted = problem.contested if wanted is None else wanted
    capture = problem.capture(merged, wanted=wanted)
    with capture.hooked():
        for batch in problem.given_samples().batches():
            yield progress
            capture.run(batch)
    _require_all(problem, capture.sites, wanted)
    return capture.sites


def _require_all(problem: _Problem, reached: Mapping[str, Any], wanted: frozenset[str]) -> None:
    missing = [name for name in problem.participants if name in wanted and name not in reached]
    if missing:
        raise UserError(
            f"The samples do not reach {len(missing)} of the layers to merge ({missing[0]} is one); "
            "leave these layers out of the LoRAs, or choose a method that needs no samples."
        )


def _discrepancy(moments: Sequence[Moments]) -> float | None:
    """‖X̃ − X‖ / ‖X‖ over all terms (the paper's Fig. 3a); None where X̃ was not looked at, or the inputs are zero."""
    size = sum(float(m.own.trace()) for m in moments)
    seen = not all(m.same for m in moments)
    return (sum(m.apart for m in moments) / size) ** 0.5 if seen and size > 0 else None


def _measured(problem: _Problem, name: str, site: Site, merged: LowRank) -> LayerReport:
    adapters, moments = problem.adapters(name), site.of(problem.participants[name])
    weights = tuple(adaptive_weight(a, m) for a, m in zip(adapters, moments, strict=True))
    found = misses(adapters, moments, weights, merged)
    return LayerReport(
        name,
        problem.participants[name],
        "measured",
        site.first,
        sum(m.count for m in moments),
        weights=weights,
        residual=found.residual,
        discrepancy=_discrepancy(moments),
        balance=found.balance,
    )
