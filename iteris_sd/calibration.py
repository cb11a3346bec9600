"""Capture of layer inputs and the drive of every merging method, on any ``nn.Module``.

Concepts run in lockstep. One forward of the model sees all concepts' samples twice, along dim 0:

    [own_1 … own_N, merged_1 … merged_N]

At every layer that a LoRA touches, the rows own_n also get LoRA n and the rows merged_n the merged adapter.
So X_n and X̃_n reach a layer in the same call, paired row by row, and nothing is stored for later.

| symbol | shape   | meaning                                                                    |
|--------|---------|----------------------------------------------------------------------------|
| X_n    | (m, in) | inputs reaching a layer in base + LoRA n, on concept n's samples           |
| X̃_n    | (m, in) | inputs reaching it in the merged model, on the same samples                |
| ΔW_n   |         | LoRA n at the layer; a concept whose LoRA skips a layer takes no part there |

*Sweep* (the default of methods that need X̃): a layer's X̃ depends only on layers upstream. So when the
inputs of a layer arrive, it is solved, and the merged rows leave it through the solution: the fixed point of
Algorithm 1 (arXiv 2411.15231) in one forward. *Iterations*: Algorithm 1 as printed; a first solve with X̃ =
X, then k times a forward with the last result and a solve of all layers.

Layers fed by the same tensor (q, k and v; all cross-attention K/V of a U-Net) share one set of moments.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA, LowRank, check_fit, working_dtype
from iteris_sd.merging import registry
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import Solution, adaptive_weight, residual

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """The samples of N concepts, and how to run the model on them.

    ``rows[n]``: how many there are of concept n. ``feed(groups)`` runs the model on the samples of those
    concepts, concatenated along dim 0 in that order; a concept may occur twice, and must then get the same
    samples twice (same noise, same timesteps). What a sample is, only ``feed`` knows. A sweep needs the
    whole of it in one forward; otherwise ``feed`` may run the model several times, each with all rows.
    """

    rows: tuple[int, ...]
    feed: Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Progress:
    """``step`` of ``steps`` passes through the model are done; ``stage`` says in words what comes next."""

    stage: str
    step: int
    steps: int


@dataclass(frozen=True)
class LayerReport:
    """How one layer was merged.

    ``participants``: concepts whose LoRA touches it. ``weights``: the λ of each participant. ``dropped``:
    participants left out, with the reason. ``residual``: Σλ‖XΔWₙᵀ − X̃ΔWᵀ‖² / Σλ‖XΔWₙᵀ‖². ``discrepancy``:
    ‖X̃ − X‖ / ‖X‖. The last two are None where nothing was measured. ``truncation``: ‖ΔW − ΔW_k‖ / ‖ΔW‖ where the
    method's own ΔW was cut to a rank k; None where it was not.
    """

    name: str
    participants: tuple[int, ...]
    weights: tuple[float, ...] = ()
    dropped: Mapping[int, str] = field(default_factory=dict)
    residual: float | None = None
    discrepancy: float | None = None
    truncation: float | None = None


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged LoRA, how each layer came about, and how often the model ran."""

    lora: LoRA
    method: str
    parameters: Mapping[str, Any]
    reports: tuple[LayerReport, ...]
    passes: int


def merge(
    modules: Mapping[str, nn.Module],
    loras: Sequence[LoRA],
    samples: Samples | None,
    method: str,
    parameters: Mapping[str, Any] | None = None,
) -> Generator[Progress, None, Merged]:
    """Merge ``loras`` into one by ``method``; yield progress before each pass, return the result.

    ``modules``: layer name -> the bare ``nn.Linear`` of the base model, in eval mode and with no LoRA in it;
    every layer that a LoRA touches must be there. ``samples`` may be None for data-free methods. A layer
    with one participant keeps its LoRA. Factors come back in the LoRAs' dtype, float32 at least.

    Raises UserError when a LoRA fits no layer, a parameter is wrong, the samples miss a layer, or a system is
    singular or not finite (naming the layer). The model is left as it was, also then.
    """
    chosen = registry.find(method)
    settings = chosen.validate(parameters or {})
    problem = _Problem(modules, loras, samples)
    solve = _Solver(problem, chosen, settings)
    outcomes, passes = problem.uncontested(), 0
    if chosen.needs == "none":
        outcomes |= {name: solve(name, None) for name in problem.contested}
    elif problem.contested:
        iterations = 0 if chosen.needs == "own" else settings.get("iterations")
        passes = 1 if iterations is None else iterations + 1
        work = _sweep(problem, solve) if iterations is None else _iterate(problem, solve, iterations)
        outcomes |= yield from work
    ordered = {name: outcomes[name] for name in problem.participants}
    lora = LoRA({name: outcome.adapter for name, outcome in ordered.items()})
    return Merged(lora, chosen.name, settings, tuple(o.report for o in ordered.values()), passes)


def measure(
    modules: Mapping[str, nn.Module], loras: Sequence[LoRA], merged: LoRA, samples: Samples
) -> tuple[LayerReport, ...]:
    """How well ``merged``, made by whatever method, serves every layer of several LoRAs: one pass, no solve.

    Weights are those of eq. 8, so that methods can be compared. Raises UserError as ``merge`` does.
    """
    problem = _Problem(modules, loras, samples)
    gathered = _gather(problem, merged)
    return tuple(_measured(problem, name, moments, merged[name]) for name, moments in gathered.items())


def finish(work: Generator[Any, None, T]) -> T:
    """Run a generator to its end, dropping what it yields, and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What became of one layer."""

    adapter: LowRank
    report: LayerReport


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is given: the base layers, the LoRAs, the samples. Raises UserError when they do not fit."""

    modules: Mapping[str, nn.Module]
    loras: Sequence[LoRA]
    samples: Samples | None

    def __post_init__(self) -> None:
        if not self.loras:
            raise UserError("There is nothing to merge: no LoRA was given.")
        if self.samples is not None and len(self.samples.rows) != len(self.loras):
            raise ValueError(f"{len(self.loras)} LoRAs need as many sample counts, got {self.samples.rows}")
        for n, lora in enumerate(self.loras):
            check_fit(lora, self.modules, f"LoRA {n + 1}")

    @cached_property
    def participants(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> the concepts whose LoRA touches it, in order of first appearance."""
        names = dict.fromkeys(name for lora in self.loras for name in lora)
        return {name: tuple(n for n, lora in enumerate(self.loras) if name in lora) for name in names}

    @cached_property
    def contested(self) -> frozenset[str]:
        """The layers with more than one participant."""
        return frozenset(name for name, who in self.participants.items() if len(who) > 1)

    def adapters(self, name: str) -> list[LowRank]:
        """The participants' adapters at a layer."""
        return [self.loras[n][name] for n in self.participants[name]]

    def uncontested(self) -> dict[str, _Outcome]:
        """The layers with one participant, which keep its LoRA."""
        return {
            name: _Outcome(self.loras[who[0]][name], LayerReport(name, who))
            for name, who in self.participants.items()
            if name not in self.contested
        }


class _Solver:
    """A method bound to a problem and its settings: (layer name, moments) -> outcome."""

    def __init__(self, problem: _Problem, method: registry.Method, settings: Mapping[str, Any]) -> None:
        self._problem, self._method = problem, method
        self._layer = method.scoped(settings, "layer")
        self._concept = method.scoped(settings, "concept")
        for name, values in self._concept.items():
            if values is not None and len(values) != len(problem.loras):
                raise UserError(
                    f"{name} needs one number per concept, {len(problem.loras)}, not {len(values)}."
                )

    def __call__(self, name: str, moments: Sequence[Moments] | None) -> _Outcome:
        adapters, who = self._problem.adapters(name), self._problem.participants[name]
        concept = {key: v if v is None else tuple(v[n] for n in who) for key, v in self._concept.items()}
        try:
            solution: Solution = self._method.solve(adapters, moments, **self._layer, **concept)
        except UserError as error:
            raise UserError(f"Layer {name} cannot be merged: {error}") from error
        dropped = {who[i]: reason for i, reason in solution.dropped.items()}
        report = LayerReport(name, who, solution.weights, dropped, truncation=solution.truncation)
        if moments is not None:
            report = replace(
                report,
                residual=residual(adapters, moments, solution.weights, solution.adapter),
                discrepancy=_discrepancy(moments),
            )
        merged = solution.adapter.to(adapters[0].down.device, working_dtype(adapters))
        return _Outcome(merged, report)


Arrive = Callable[[str, tuple[Moments, ...]], None]


def _sweep(problem: _Problem, solve: _Solver) -> Generator[Progress, None, dict[str, _Outcome]]:
    """Solve every layer as its inputs arrive: the fixed point of Algorithm 1 in one forward."""
    outcomes: dict[str, _Outcome] = {}
    merged = {name: outcome.adapter for name, outcome in problem.uncontested().items()}

    def arrive(name: str, moments: tuple[Moments, ...]) -> None:
        if name in outcomes:
            raise UserError(
                f"The samples reach {name} twice in one sweep; choose a number of iterations instead."
            )
        outcomes[name] = solve(name, moments)
        merged[name] = outcomes[name].adapter

    yield Progress("sweeping through the layers", 0, 1)
    _forward(problem, merged, arrive)
    _require_all(problem, outcomes)
    return outcomes


def _iterate(
    problem: _Problem, solve: _Solver, iterations: int
) -> Generator[Progress, None, dict[str, _Outcome]]:
    """Algorithm 1 as printed: a first solve with X̃ = X, then ``iterations`` refinements."""
    merged = {name: outcome.adapter for name, outcome in problem.uncontested().items()}
    outcomes: dict[str, _Outcome] = {}
    for k in range(iterations + 1):
        yield Progress(f"refinement {k} of {iterations}" if k else "first solve", k, iterations + 1)
        gathered = _gather(problem, merged if k else None)
        outcomes = {name: solve(name, moments) for name, moments in gathered.items()}
        merged |= {name: outcome.adapter for name, outcome in outcomes.items()}
    return outcomes


def _gather(problem: _Problem, merged: Mapping[str, LowRank] | None) -> dict[str, tuple[Moments, ...]]:
    """Moments of every contested layer, one per participant; X̃ = X where ``merged`` is None."""
    gathered: dict[str, tuple[Moments, ...]] = {}

    def arrive(name: str, moments: tuple[Moments, ...]) -> None:
        before = gathered.get(name)
        gathered[name] = tuple(a + b for a, b in zip(before, moments, strict=True)) if before else moments

    _forward(problem, merged, arrive)
    _require_all(problem, gathered)
    return gathered


def _forward(problem: _Problem, merged: Mapping[str, LowRank] | None, arrive: Arrive) -> None:
    """Run the samples in lockstep; the merged rows are left out where ``merged`` is None.

    ``arrive`` gets the moments of each contested layer before the layer's output is made, and may thus still
    change ``merged[name]``.
    """
    if problem.samples is None:
        raise ValueError("this method needs samples")
    concepts = list(range(len(problem.loras)))
    groups = concepts if merged is None else concepts * 2
    adapters: list[Mapping[str, LowRank]] = [*problem.loras]
    adapters += [] if merged is None else [merged] * len(concepts)
    cuts = [0, *accumulate(problem.samples.rows[n] for n in groups)]
    rows = [slice(*cut) for cut in pairwise(cuts)]
    sites = _Sites(rows, len(concepts))

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if len(x) != cuts[-1]:
            raise UserError(
                f"{name} was given {len(x)} rows where the samples have {cuts[-1]}; it cannot be merged."
            )
        if name in problem.contested:
            arrive(name, tuple(sites.moments(x, n) for n in problem.participants[name]))
        for part, lora in zip(rows, adapters, strict=True):
            if name in lora:
                output[part] += lora[name].to(x.device, x.dtype).apply(x[part])
        return output

    handles = [
        problem.modules[name].register_forward_hook(partial(hook, name)) for name in problem.participants
    ]
    try:
        with torch.no_grad():
            problem.samples.feed(groups)
    finally:
        for handle in handles:
            handle.remove()


class _Sites:
    """Moments by input tensor, so that layers fed by the same tensor share them while that tensor lives."""

    def __init__(self, rows: Sequence[slice], concepts: int) -> None:
        self._own, self._merged = rows[:concepts], rows[concepts:]
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def moments(self, x: Tensor, n: int) -> Moments:
        """Moments of concept n in the input ``x`` (rows, …, in)."""
        version = 0 if x.is_inference() else x._version  # a tensor changed in place is another input
        known = self._known.setdefault(x, {})
        if (version, n) not in known:
            known[version, n] = Moments.of(x[self._own[n]], x[self._merged[n]] if self._merged else None)
        return known[version, n]


def _require_all(problem: _Problem, reached: Mapping[str, Any]) -> None:
    missing = [name for name in problem.participants if name in problem.contested and name not in reached]
    if missing:
        raise UserError(
            f"The samples do not reach {len(missing)} of the layers to merge ({missing[0]} is one); "
            "leave these layers out of the LoRAs, or choose a method that needs no samples."
        )


def _discrepancy(moments: Sequence[Moments]) -> float | None:
    """‖X̃ − X‖ / ‖X‖ over all terms (the paper's Fig. 3a); None where the inputs are zero."""
    size = sum(float(m.own.trace()) for m in moments)
    return (sum(m.distance() for m in moments) / size) ** 0.5 if size > 0 else None


def _measured(problem: _Problem, name: str, moments: Sequence[Moments], merged: LowRank) -> LayerReport:
    adapters = problem.adapters(name)
    weights = tuple(adaptive_weight(a, m.own) for a, m in zip(adapters, moments, strict=True))
    value = residual(adapters, moments, weights, merged)
    return LayerReport(name, problem.participants[name], weights, {}, value, _discrepancy(moments))
