"""`bench merge`: IterIS here against IterIS as its authors' code does it, on Stable Diffusion v1.5's shapes.

Three ways, interleaved in one process on the same LoRAs and samples: the authors' (`authors.py`), our sweep, and our
`iterations=k`. Memory is measured in a process of its own for each. The floor is what the sweep cannot do without: one
forward of every sample in the single and in the merged model, and the three Gram matrices of each site.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iteris_sd import memory
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
    the last stands for those that were not run, and there are none where its features do not fit into memory. `step`:
    seconds of one denoising step of all samples under guidance, of which their trajectories consist; where pictures are
    part of the problem, one micro-batch timed and multiplied.
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
    step: float | None
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

    def authors_seconds(self, iterations: int) -> float | None:
        """The authors' way with so many iterations after the first solve; None where it could not be run."""
        if not self.authors_solves:
            return None
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
    size: Size, alpha: float = 1e-4, sweeps: int = 3, stages: int | None = None, peaks: bool = True
) -> Result:
    """Measure all ways. `stages`: iterations to convergence, two for each text layer and one unless given."""
    sampled = size.scope == "everything"
    # Before this process holds a problem of its own.
    held = _memory(size, alpha, iterated=not sampled) if peaks else {}
    problem = problems.build(size)
    converged = stages or 2 * size.layers + 1
    times: list[float] = []
    solves, results = [], []
    work: Generator[Mapping[str, Tensor], None, None] | None = authors.solves(problem, alpha)
    count = 2 if sampled else converged + 1
    for k in range(count):
        solve = _next_solve(work, size.device)
        if solve is None:  # the features of all layers do not fit, and never will
            work = None
        else:
            solves.append(solve[0])
            if k in (CAP, count - 1):
                results.append(solve[1])
        if k * sweeps // count != (k + 1) * sweeps // count:
            took, ours = measuring.seconds(partial(_merged, problem, alpha), size.device)
            times.append(took)
    del work
    iterated, differences = None, {}
    if not sampled and results:
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
        step=_step(problem, size) if sampled else None,
        floor=single,
        floor_double=double,
        memory=held,
        differences=differences,
        condition=max(r.condition or 0.0 for r in ours.reports),
        frontier=ours.frontier,
    )


def _next_solve(
    work: Generator[Mapping[str, Tensor], None, None] | None, device: str
) -> tuple[float, Mapping[str, Tensor]] | None:
    """Seconds and result of the authors' next solve; None where memory does not suffice for it."""
    if work is None:
        return None
    try:
        took, dense = measuring.seconds(lambda: next(work), device)
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
    else:
        return took, dense
    work.close()
    memory.tidy()
    return None


def _step(problem: Problem, size: Size) -> float:
    """Seconds of one denoising step of all samples: each goes through the model twice, with and without its prompt."""
    rows = [tensor[: problem.micro_batch].repeat_interleave(2, dim=0) for tensor in problem.batches[0]]
    with torch.no_grad():
        problem.run(*rows)
        took, _ = measuring.seconds(lambda: problem.run(*rows), size.device)
    return took * sum(len(batch[0]) for batch in problem.batches) / (len(rows[0]) / 2)


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
    """Seconds of the forwards and Gram matrices at the machine's rate, the latter in float32 and in float64, as plain
    products: that two of the three are symmetric would save a third of them."""
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
    found = {}
    for way, work in ways.items():
        with suppress(MemoryError):  # more than there is: not measured
            found[way] = measuring.peak_bytes(prepare, work)
    return found


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
    sweep, found = result.best_sweep, dict[str, float]()
    for told, iterations in (
        (f"at {CAP} iterations", CAP),
        (f"converged ({result.iterations})", result.iterations),
    ):
        theirs = result.authors_seconds(iterations)
        if theirs is not None:
            found[f"time, authors {told} / sweep"] = theirs / sweep
    found["time, sweep / floor with float32 Grams"] = sweep / result.floor
    found["time, sweep / floor with float64 Grams"] = sweep / result.floor_double
    theirs = result.memory.get("authors")
    for way in ("sweep", "iterations"):
        if theirs and way in result.memory:
            found[f"memory, {way} / authors"] = result.memory[way] / theirs
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
        *(
            (f"authors' way, {name}", "did not fit into memory" if took is None else f"{took:.1f} s{note}")
            for name, took in (
                (f"{CAP} iterations", result.authors_seconds(CAP)),
                (f"converged ({result.iterations})", result.authors_seconds(result.iterations)),
            )
        ),
        (
            "floor",
            f"{result.floor:.2f} s with float32 Gram matrices, {result.floor_double:.2f} s with float64",
        ),
        ("held by waiting micro-batches", f"{result.frontier / 2**20:.0f} MiB"),
        ("largest condition number", f"{result.condition:.3g}"),
    ]
    if result.step is not None:
        told.append(("each step of the samples' trajectories, apart", f"{result.step:.1f} s"))
    if result.ours_iterated is not None:
        told.append((f"ours, iterations={CAP}", f"{result.ours_iterated:.1f} s"))
    told += [(f"memory, {way}", f"{peak / 2**20:.0f} MiB") for way, peak in result.memory.items()]
    told += [(f"difference to authors converged: {way}", f"{d:.2e}") for way, d in result.differences.items()]
    told += [(name, f"{value:.2f}") for name, value in ratios(result).items()]
    return told
