"""A training loop that resumes exactly: one plan, one module, one loss; averaged weights, log, curve, samples."""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from iteris_sd.storybook.machine import Machine


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    The learning rate rises to `peak` over `warmup` steps, stays there, and falls to zero over the last `cooldown`
    share of the steps (arXiv 2405.18392): a run that is to go on longer resumes from before its fall.
    """

    stage: str
    steps: int
    batch: int
    peak: float
    warmup: int = 100
    seed: int = 0
    average: float = 0.999
    decay: float = 0.01
    cooldown: float = 0.3
    slower: Mapping[str, float] = field(
        default_factory=dict
    )  # parts of the module that learn at a share of the rate
    save_every: int = 500
    sample_every: int = 1000

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        left = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return self.peak * min(1.0, (step + 1) / max(1, self.warmup), left)

    def generator(self, step: int) -> torch.Generator:
        """All randomness of a step comes from here, so that a resumed run repeats an uninterrupted one."""
        return torch.Generator().manual_seed(self.seed * 10_000_019 + step)


M = TypeVar("M", bound=nn.Module)


def fit(
    plan: Plan,
    module: M,
    loss: Callable[[M, torch.Generator], Tensor],
    directory: Path,
    machine: Machine,
    sampler: Callable[[M, int], None] | None = None,
) -> M:
    """Train `module` in place, on its own device, and return its exponential moving average.

    `directory` holds the checkpoint (weights, average, optimizer, step), the log and the curve; a run that finds
    a checkpoint there goes on from it and ends with the weights an uninterrupted run would have.
    """
    directory.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(module).requires_grad_(False).eval()
    groups = _groups(plan, module)
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters)} for _, parameters in groups],
        lr=plan.peak,
        betas=(0.9, 0.99),
        weight_decay=plan.decay,
        fused=True,
    )
    start = _resume(directory, module, average, optimizer)
    module.train()
    with Log(directory / f"{plan.stage}.csv", start) as log:
        for step in range(start, plan.steps):
            for group, (share, _) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = share * plan.rate(step)
            with machine.autocast():
                value = loss(module, plan.generator(step))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            _follow(average, module, min(plan.average, (1 + step) / (10 + step)))
            log.write(step, float(value.detach()), plan)
            last = step + 1 == plan.steps
            if last or (step + 1) % plan.save_every == 0:
                _save(directory, module, average, optimizer, step + 1)
            if sampler is not None and (last or (step + 1) % plan.sample_every == 0):
                sampler(average, step + 1)
    draw_curve(directory / f"{plan.stage}.csv")
    return average


def _groups(plan: Plan, module: nn.Module) -> list[tuple[float, list[nn.Parameter]]]:
    """The parameters by the share of the learning rate they get."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        groups.setdefault(plan.slower.get(name.partition(".")[0], 1.0), []).append(parameter)
    return list(groups.items())


@torch.no_grad()
def _follow(average: nn.Module, module: nn.Module, keep: float) -> None:
    mine: list[Tensor] = list(average.parameters())
    theirs = [p.detach() for p in module.parameters()]
    torch._foreach_lerp_(mine, theirs, 1.0 - keep)
    for slow, fast in zip(average.buffers(), module.buffers(), strict=True):
        slow.copy_(fast)


def _save(
    directory: Path, module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    state = {
        "module": module.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    partial = directory / "checkpoint.partial"
    torch.save(state, partial)
    partial.replace(directory / "checkpoint.pt")


def _resume(directory: Path, module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    path = directory / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    module.load_state_dict(state["module"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


class Log:
    """Writes step, loss, learning rate and pictures per second to a CSV file, and now and then to the terminal."""

    def __init__(self, path: Path, start: int) -> None:
        """Open the log; lines of steps after the checkpoint are dropped, they are about to be repeated."""
        rows = list(csv.reader(path.open()))[1 : start + 1] if path.exists() else []
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows([("step", "loss", "rate", "pictures_per_second"), *rows])
        self._since, self._recent = time.perf_counter(), 0.0

    def __enter__(self) -> Log:
        """Return the open log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def write(self, step: int, loss: float, plan: Plan) -> None:
        """Append one step."""
        now = time.perf_counter()
        speed = plan.batch / (now - self._since)
        self._since = now
        self._recent = loss if step == 0 or not self._recent else 0.98 * self._recent + 0.02 * loss
        self._writer.writerow((step, f"{loss:.6f}", f"{plan.rate(step):.2e}", f"{speed:.1f}"))
        if (step + 1) % 50 == 0:
            self._file.flush()
            print(f"{plan.stage} {step + 1}/{plan.steps} loss {self._recent:.5f} {speed:.1f}/s", flush=True)


def draw_curve(path: Path) -> None:
    """Draw the loss of a log as a PNG beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open() as file:
        rows = list(csv.DictReader(file))
    steps, losses = [int(r["step"]) for r in rows], torch.tensor([float(r["loss"]) for r in rows])
    if not steps:
        return
    width = max(1, len(losses) // 100)
    smooth = torch.nn.functional.avg_pool1d(losses[None], width, stride=1)[0]
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.plot(steps, losses, linewidth=0.4, color="0.75", label="each step")
    axes.plot(steps[width - 1 :], smooth, color="#0b6e6e", label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=path.stem)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
