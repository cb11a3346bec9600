"""`bench merge`: IterIS here against IterIS as its authors' code does it, on Stable Diffusion v1.5's shapes.

Three ways, interleaved in one process on the same LoRAs and samples: the authors' (`authors.py`), our sweep, and our
`iterations=k`. Memory is measured in a process of its own for each. The floor is what the sweep cannot do without: one
forward of every sample in the single and in the merged model, and the three Gram matrices of each site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iteris_sd.benchmarks import authors, measuring, problems
from iteris_sd.benchmarks.problems import Problem, Size
from iteris_sd.calibration import Merged, finish, merge
from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA

CAP = 20  # iterations the paper stops at


@dataclass(frozen=True)
class Result:
    """What was measured. Times in seconds, memory in bytes, differences relative to the authors' way converged.

    `authors_solves`: seconds of each solve of the authors' way, the inference before it included; where `extrapolated`
    the last stands for those that were not run.
    """

    size: Size
    machine: str
    alpha: float
    iterations: int
    layers: int
    sweep: tuple[float, ...]
    ours_iterated: float | None
    authors_solves: tuple[float, ...]
    extrapolated: bool
    floor: float
    floor_double: float
    memory: Mapping[str, int]
    differences: Mapping[str, float]
    condition: float
    frontier: int

    @property
    def best_sweep(self) -> float:
        """The shortest of the sweeps."""
        return min(self.sweep)

    def authors_seconds(self, iterations: int) -> float:
        """The authors' way with so many iterations after the first solve."""
        told = self.authors_solves[: iterations + 1]
        return sum(told) + (iterations + 1 - len(told)) * self.authors_solves[-1]


def on_this_machine(scope: str, samples: int | None, rank: int) -> Size:
    """The size to measure: the paper's where a GPU is present; everything on a CPU with 4 samples each at 256 px.

    Raises UserError when there is no such scope.
    """
    if scope not in ("text", "everything"):
        raise UserError(f"There is no scope {scope!r}; choose text or everything.")
    gpu = torch.cuda.is_available()
    small = scope == "everything" and not gpu
    return Size(
        scope=scope,
        samples=samples or (4 if small else 50),
        rank=rank,
        latents=32 if small else 64,
        device="cuda" if gpu else "cpu",
    )


def run(
    size: Size, alpha: float = 1e-4, sweeps: int = 3, stages: int | None = None, memory: bool = True
) -> Result:
    """Measure all ways. `stages`: iterations to convergence, two for each text layer and one unless given."""
    sampled = size.scope == "everything" and size.device == "cpu"
    # Before this process holds a problem of its own.
    peaks = _memory(size, alpha, iterated=not sampled) if memory else {}
    problem = problems.build(size)
    converged = stages or 2 * size.layers + 1
    times: list[float] = []
    solves, results = [], []
    work = authors.solves(problem, alpha)
    count = 2 if sampled else converged + 1
    for k in range(count):
        took, dense = measuring.seconds(lambda: next(work), size.device)
        solves.append(took)
        if k in (CAP, count - 1):
            results.append(dense)
        if k * sweeps // count != (k + 1) * sweeps // count:
            took, ours = measuring.seconds(partial(_merged, problem, alpha), size.device)
            times.append(took)
    work.close()
    iterated, differences = None, {}
    if not sampled:
        iterated, again = measuring.seconds(partial(_merged, problem, alpha, iterations=CAP), size.device)
        differences = {
            "sweep": _difference(ours.lora, results[-1]),
            f"iterations={CAP}": _difference(again.lora, results[-1]),
        }
        if len(results) > 1:
            differences[f"authors, {CAP} iterations"] = _apart(results[0], results[-1])
    single, double = _floor(problem, ours, measuring.rate(size.device))
    return Result(
        size=size,
        machine=measuring.machine(size.device),
        alpha=alpha,
        iterations=converged,
        layers=len(problem.modules),
        sweep=tuple(times),
        ours_iterated=iterated,
        authors_solves=tuple(solves),
        extrapolated=sampled,
        floor=single,
        floor_double=double,
        memory=peaks,
        differences=differences,
        condition=max(r.condition or 0.0 for r in ours.reports),
        frontier=ours.frontier,
    )


@dataclass(frozen=True)
class Step:
    """How our ways grow: seconds of a sweep, what its micro-batches held, and peak memory of both ways, in bytes."""

    samples: int
    concepts: int
    sweep: float
    frontier: int
    sweep_memory: int
    iterations_memory: int


def growth(size: Size, alpha: float = 1e-4) -> list[Step]:
    """The sweep with half, all and twice the samples, and with twice and three times the concepts."""
    sizes = [replace(size, samples=max(1, size.samples * k // 2)) for k in (1, 2, 4)]
    sizes += [replace(size, concepts=size.concepts * k) for k in (2, 3)]
    steps = []
    for one in sizes:
        problem = problems.build(one)
        took, ours = measuring.seconds(partial(_merged, problem, alpha), one.device)
        del problem
        peaks = [
            measuring.peak_bytes(partial(problems.build, one), partial(_ours_once, alpha, iterations))
            for iterations in (None, 1)
        ]
        steps.append(Step(one.samples, one.concepts, took, ours.frontier, *peaks))
    return steps


def _merged(problem: Problem, alpha: float, **parameters: Any) -> Merged:
    settings = {"alpha": alpha, **parameters}
    return finish(merge(problem.modules, problem.loras, problem.samples(), "iteris", settings))


def _difference(ours: LoRA, theirs: Mapping[str, Tensor]) -> float:
    return _apart({name: adapter.delta() for name, adapter in ours.items()}, theirs)


def _apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖, the largest of all layers."""
    return max(float((ours[name] - dW).norm() / dW.norm()) for name, dW in theirs.items())


def _floor(problem: Problem, merged: Merged, rate: measuring.Rate) -> tuple[float, float]:
    """Seconds of the forwards and Gram matrices at the machine's rate, the latter in float32 and in float64."""
    samples = sum(len(batch[0]) for batch in problem.batches)
    forward = 2 * samples * problem.macs / rate.single
    widths = {name: adapter.shape[1] for name, adapter in merged.lora.items()}
    grams = sum(3 * r.rows * widths[r.name] ** 2 for r in merged.reports if r.site == r.name)
    return forward + grams / rate.single, forward + grams / rate.double


def _memory(size: Size, alpha: float, iterated: bool) -> dict[str, int]:
    """Peak memory of each way above what is resident when the problem stands; of the authors' one iteration.

    `iterated`: also of our `iterations=1`, which holds the moments of all sites at once: dozens of gigabytes where the
    whole U-Net is merged.
    """
    prepare = partial(problems.build, size)
    ways = {"authors": partial(_authors_once, alpha), "sweep": partial(_ours_once, alpha, None)}
    if iterated:
        ways["iterations"] = partial(_ours_once, alpha, 1)
    return {way: measuring.peak_bytes(prepare, work) for way, work in ways.items()}


def _authors_once(alpha: float, problem: Problem) -> None:
    work = authors.solves(problem, alpha)
    next(work)
    next(work)


def _ours_once(alpha: float, iterations: int | None, problem: Problem) -> None:
    _merged(problem, alpha, iterations=iterations)


def described(result: Result) -> dict[str, Any]:
    """Everything as plain values for JSON."""
    return asdict(result) | {"ratios": dict(ratios(result))}


def ratios(result: Result) -> Mapping[str, float]:
    """The authors' way over the sweep, in time and memory; the sweep over its floors."""
    sweep = result.best_sweep
    found = {
        f"time, authors at {CAP} iterations / sweep": result.authors_seconds(CAP) / sweep,
        f"time, authors converged ({result.iterations}) / sweep": result.authors_seconds(result.iterations)
        / sweep,
        "time, sweep / floor with float32 Grams": sweep / result.floor,
        "time, sweep / floor with float64 Grams": sweep / result.floor_double,
    }
    if result.memory:
        found["memory, sweep / authors"] = result.memory["sweep"] / result.memory["authors"]
    if "iterations" in result.memory:
        found["memory, iterations / authors"] = result.memory["iterations"] / result.memory["authors"]
    return found


def lines(result: Result) -> Sequence[tuple[str, str]]:
    """What was measured, as pairs of words."""
    size = result.size
    note = ", later ones taken to be like the last" if result.extrapolated else ""
    told = [
        (
            "problem",
            f"{size.scope}: {result.layers} layers, {size.concepts} LoRAs of rank {size.rank}, "
            f"{size.samples} samples each, α = {result.alpha:g}",
        ),
        ("machine", result.machine),
        ("sweep", " / ".join(f"{t:.2f} s" for t in result.sweep)),
        (f"authors' way, {CAP} iterations", f"{result.authors_seconds(CAP):.1f} s{note}"),
        (
            f"authors' way, converged ({result.iterations})",
            f"{result.authors_seconds(result.iterations):.1f} s{note}",
        ),
        (
            "floor",
            f"{result.floor:.2f} s with float32 Gram matrices, {result.floor_double:.2f} s with float64",
        ),
        ("held by waiting micro-batches", f"{result.frontier / 2**20:.0f} MiB"),
        ("largest condition number", f"{result.condition:.3g}"),
    ]
    if result.ours_iterated is not None:
        told.append((f"ours, iterations={CAP}", f"{result.ours_iterated:.1f} s"))
    told += [(f"memory, {way}", f"{peak / 2**20:.0f} MiB") for way, peak in result.memory.items()]
    told += [(f"difference to authors converged: {way}", f"{d:.2e}") for way, d in result.differences.items()]
    told += [(name, f"{value:.2f}") for name, value in ratios(result).items()]
    return told
