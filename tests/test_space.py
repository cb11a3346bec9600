"""A public page: its bounds, seconds of a lent GPU, and events that can leave the process they were made in."""

from __future__ import annotations

import importlib.util
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

import gradio as gr
import pytest
import torch

import iteris_sd.ui
from iteris_sd import backbone as backbones
from iteris_sd import limits, merger, serving, weights
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, Failure, MergeDone, Picture, Progress, received, sent
from iteris_sd.history import History
from iteris_sd.recipe import Recipe
from iteris_sd.ui import heavy, jobs, page, space
from iteris_sd.ui.visits import Visits
from tests.browser import ROOT


def recipe(**changes: Any) -> Recipe:
    told = {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0} next to a {1}",
        "seeds": [0],
        "steps": 2,
        "calibration": {"samples": 2, "steps": 2},
    }
    return Recipe.of(told | changes)


def lent(wrap: Callable[..., Any]) -> ModuleType:
    """A stand-in for the library of lent GPUs."""
    module = ModuleType("spaces")
    module.__spec__ = type("Spec", (), {"name": "spaces"})()
    module.GPU = wrap  # type: ignore[attr-defined]
    return module


def crossed(value: Any) -> Any:
    """A value as it comes out of a queue between processes."""
    return pickle.loads(ForkingPickler.dumps(value))


@pytest.fixture
def zero_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A lent GPU; the seconds that were asked for."""
    seconds: list[int] = []

    def wrap(duration: Callable[..., int]) -> Callable[..., Any]:
        def around(work: Callable[..., Generator]) -> Callable[..., Generator]:
            def called(*given: Any) -> Generator:
                seconds.append(duration(*given))
                for event in work(*crossed(given)):
                    yield crossed(event)

            return called

        return around

    monkeypatch.setitem(sys.modules, "spaces", lent(wrap))
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    borrowing = space._borrowing
    borrowing.cache_clear()
    yield seconds
    borrowing.cache_clear()
    space._missing.clear()


# ---------------------------------------------------------------- events from a worker


def test_events_come_out_of_the_worker_whole(toy: Path, zero_gpu: list[int]) -> None:
    assert serving.lent()
    events = list(space.events(recipe(), Library.shipped()))
    made = events[-1]
    assert isinstance(made, Composition) and len(made.pictures) == 3
    assert all(adapter.up.device.type == "cpu" for adapter in made.merged["iteris"].lora.values())
    assert zero_gpu == [space.duration(recipe(), Library.shipped())]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted as Linux tells them")
def test_what_comes_out_of_the_worker_keeps_no_file_open(toy: Path, zero_gpu: list[int]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = list(space.events(recipe(), Library.shipped()))
    assert any(isinstance(event, Composition) for event in kept)
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # Python's own, opened once


def test_work_is_closed_with_what_it_is_sent_by() -> None:
    closed = []

    def work() -> Generator[int, None, None]:
        try:
            yield from (1, 2)
        finally:
            closed.append(True)

    given = received(sent(work()))
    assert next(given) == 1
    given.close()
    assert closed == [True]


def _failing(error: Exception) -> Generator[Progress, None, None]:
    yield Progress("Loading", 0, 1)
    raise error


def test_a_failure_comes_as_a_value_and_is_raised_on_this_side() -> None:
    *_, last = map(pickle.loads, sent(_failing(UserError("No such dog; pick another."))))
    assert last == Failure("No such dog; pick another.")
    with pytest.raises(UserError, match="No such dog; pick another."):
        list(received(sent(_failing(UserError("No such dog; pick another.")))))
    with pytest.raises(RuntimeError, match="in _failing(.|\n)*ZeroDivisionError: by nought"):
        list(received(sent(_failing(ZeroDivisionError("by nought")))))


def _job(asked: Recipe, folder: Path) -> jobs.Job:
    job = jobs.Job(asked, Library.shipped(), folder, History(folder / "history"))
    job.start()
    assert job.wait(60)
    return job


def test_what_is_wrong_in_the_worker_is_told_to_the_person(
    toy: Path, zero_gpu: list[int], tmp_path: Path
) -> None:
    job = _job(recipe(sampler="lcm"), tmp_path)
    assert job.state.phase == "failed" and "needs an LCM-LoRA" in job.state.message


def test_a_quota_that_is_used_up_is_told_as_the_lender_says_it(
    toy: Path, zero_gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any) -> Generator:
        raise gr.Error("You have exceeded your quota. Try again in 3:00:00.", title="ZeroGPU quota exceeded")
        yield

    monkeypatch.setattr(space, "_borrowing", lambda work: none_left)
    told = _job(recipe(), tmp_path).state.message
    assert told == "ZeroGPU quota exceeded: You have exceeded your quota. Try again in 3:00:00."


def test_what_is_finished_when_the_gpu_is_taken_away_is_kept(
    toy: Path, zero_gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    borrowing = space._borrowing

    def taken_away(*given: Any) -> Generator:
        for part in borrowing(space._compose)(*given):
            yield part
            if isinstance(pickle.loads(part), Picture):
                raise gr.Error("GPU task aborted", title="ZeroGPU worker error")

    monkeypatch.setattr(space, "_borrowing", lambda work: taken_away)
    state = _job(recipe(), tmp_path).state
    assert state.phase == "failed" and state.message == "ZeroGPU worker error: GPU task aborted"
    assert len(state.pictures) == 1 and state.files is not None and "grid" in state.files


def test_a_merge_is_remembered_when_its_worker_is_gone(
    toy: Path, zero_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def worker(*given: Any) -> Generator:
        parts = list(sent(space._compose(*given)))
        merger.forget()  # what it knew goes with it
        yield from parts

    monkeypatch.setattr(space, "_borrowing", lambda work: worker)
    merger.forget()
    times = [list(space.events(recipe(seeds=[seed]), Library.shipped())) for seed in (0, 1)]
    made = [event.remembered for events in times for event in events if isinstance(event, MergeDone)]
    assert made == [False, False, True, True]


# ---------------------------------------------------------------- models


def test_without_a_lent_gpu_nothing_is_wrapped(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert not serving.lent()
    monkeypatch.setattr(backbones, "load", None)
    space.prepare()  # loads nothing
    monkeypatch.undo()
    assert isinstance(list(space.events(recipe(), Library.shipped()))[-1], Composition)


@pytest.mark.parametrize(("told", "is_lent"), [("true", True), ("1", True), ("false", False), ("", False)])
def test_whether_a_gpu_is_lent_is_read_as_the_lender_reads_it(
    told: str, is_lent: bool, zero_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", told)
    assert serving.lent() is is_lent


def test_the_lender_comes_before_anything_that_looks_for_a_gpu(
    zero_gpu: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "spaces.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "spaces")
    monkeypatch.setenv("ZEROGPU_MMAP_AUTOPRUNE_PATTERN", "")  # goes with the test
    monkeypatch.delenv("ZEROGPU_MMAP_AUTOPRUNE_PATTERN")
    there: list[tuple[bool, str | None]] = []
    pattern = "ZEROGPU_MMAP_AUTOPRUNE_PATTERN"
    monkeypatch.setattr(
        iteris_sd.ui, "prepare", lambda: there.append(("spaces" in sys.modules, os.environ.get(pattern)))
    )
    runpy.run_path(str(ROOT / "app.py"), run_name="app")
    assert there == [(True, "nothing")]


def test_models_are_loaded_before_anybody_asks_and_in_no_thread(
    toy: Path, zero_gpu: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[str] = []
    load = backbones.load

    def noted(name: str) -> backbones.Backbone:
        made = load(name)
        loaded.append(name)
        return made

    monkeypatch.setattr(backbones, "load", noted)
    space.prepare()
    assert loaded == ["storybook"]  # the other is not to be had without a network
    told = space.lacking()
    assert told.startswith("Stable Diffusion v1.5 could not be loaded when this page began.")
    assert "Storybook, works without a network" in told and told in capsys.readouterr().out
    space.check(recipe())
    with pytest.raises(
        UserError, match="could not be loaded when this page began.*Choose another base model"
    ):
        space.check(recipe(base="sd15"))
    with pytest.raises(
        UserError, match="too few to load DreamShaper 8; choose Storybook and Stable Diffusion"
    ):
        space.check(recipe(base="Lykon/dreamshaper-8"))
    loaded.clear()
    jobs.load("storybook")
    assert loaded == []


def test_the_page_tells_what_is_lacking_and_is_not_rendered_on_the_server(
    zero_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_SSR_MODE", "true")  # as Spaces have it
    served: list[tuple[gr.Blocks, dict[str, Any]]] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda blocks, **how: served.append((blocks, how)))
    space._missing["sd15"] = "The Hub is <down>."
    page.launch()
    ((blocks, how),) = served
    (notice,) = (one for one in blocks.blocks.values() if getattr(one, "elem_id", "") == "notice")
    assert "when this page began. The Hub is &lt;down&gt;." in notice.value
    assert how["ssr_mode"] is False


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("spaces") is None,
    reason="Hugging Face's package spaces is not installed: pip install spaces",
)
@pytest.mark.skipif(torch.version.cuda is None, reason="spaces needs a PyTorch that was built for CUDA")
def test_with_the_lenders_own_package_a_composition_comes_through() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.lent"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# ---------------------------------------------------------------- bounds


def test_more_work_asks_for_more_seconds(toy: Path) -> None:
    library = Library.shipped()
    few, many = recipe(steps=10), recipe(steps=10, seeds=[0, 1, 2, 3])
    assert 0 < space.duration(few, library) < space.duration(many, library)
    assert space.duration_merging(few, library) == space.duration_merging(many, library)
    fewer = recipe(methods=[{"name": "linear"}])
    assert space.duration_inside(fewer, library) <= space.duration_inside(few, library)


USUAL = {"base": "sd15", "seeds": [0, 1, 2, 3], "steps": 25, "calibration": {}}


LONG = {
    "concepts": [{"name": name} for name in ("dog", "barn", "cat")],
    "methods": [{"name": name} for name in ("iteris", "regmean", "regmean_pp", "ssr")],
    "seeds": list(range(8)),
    "steps": 12,
}  # within the bounds of a public page, but not within those of a lent GPU


@pytest.mark.parametrize("seconds", [space.duration, space.duration_merging, space.duration_inside])
def test_what_is_usual_fits_into_what_is_lent(seconds: Callable[[Recipe, Library], int]) -> None:
    assert 30 < seconds(recipe(**USUAL), Library({})) < limits.MAX_GPU_SECONDS


@pytest.mark.parametrize(
    ("seconds", "changes", "fewer"),
    [
        (space.duration, {"size": 1024}, "pictures, steps, methods"),
        (space.duration, {"seeds": list(range(16))}, "pictures, steps, methods"),
        (space.duration_merging, {"calibration": {"samples": 256, "steps": 50}}, "concepts, methods or cal"),
        (
            space.duration_inside,
            {"calibration": {"samples": 150}},
            "concepts, methods or calibration samples",
        ),
    ],
)
def test_what_would_be_cut_off_is_refused(
    seconds: Callable[[Recipe, Library], int], changes: dict[str, Any], fewer: str
) -> None:
    expected = rf"take about 1?\d\d\d s .* for at most 120 s at a time; ask for fewer {fewer}"
    with pytest.raises(UserError, match=expected):
        seconds(recipe(**USUAL | changes), Library({}))


def test_a_composition_that_is_too_long_for_a_lent_gpu_is_refused_at_once(zero_gpu: list[int]) -> None:
    space.check(recipe(**USUAL))
    with pytest.raises(UserError, match="s of the GPU that is lent to this page"):
        space.check(recipe(**USUAL | LONG))
    assert zero_gpu == []  # nobody was asked for one


def test_a_public_page_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    large = recipe(seeds=list(range(16)))
    space.check(large)
    assert not weights.safety_wanted()
    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    with pytest.raises(UserError, match="draws at most 32 pictures at once, not 48; ask for fewer"):
        space.check(large)
    with pytest.raises(UserError, match="at most 50 steps at once, not 60"):
        space.check(recipe(steps=60))
    assert weights.safety_wanted()
    monkeypatch.setenv("ITERIS_SD_SAFETY", "off")
    assert not weights.safety_wanted()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"seeds": list(range(10)), "steps": 50, "size": 1024},
            "30 pictures of 1024 px in 50 steps are as much work as 6000 steps at 512 px, and this public page does at "
            "most 400 at once; ask for fewer pictures or steps, or smaller ones",
        ),
        (
            {"calibration": {"samples": 256, "steps": 50}, "size": 256},
            r"go through the model 6528 times, counted at 512 px, .* at most 4000 times; ask for fewer samples per "
            r"concept \(now 256\), trajectory steps \(50\)",
        ),
    ],
)
def test_a_public_page_bounds_the_work_as_well(
    changes: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space.check(recipe(**changes))
    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    with pytest.raises(UserError, match=complaint):
        space.check(recipe(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": list(range(10)), "steps": 50, "calibration": {}},
        {"concepts": [{"name": name} for name in "abcdef"], "calibration": {}},
        {
            "methods": [{"name": "linear"}, {"name": "custom_diffusion"}],
            "calibration": {"samples": 256, "steps": 50},
            "size": 512,
        },  # neither looks at samples
        USUAL,
    ],
)
def test_what_is_usual_is_done_on_a_public_page(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    monkeypatch.setattr(space, "_has_gpu", lambda: True)
    space.check(recipe(**changes))


def test_whether_there_is_a_gpu_is_asked_where_torch_is_imported_by_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads that import it at once trip over half-made modules; `heavy.bring_in` holds the lock."""
    brought: list[bool] = []
    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    monkeypatch.setattr(heavy, "bring_in", lambda: brought.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(brought))
    space.check(recipe(base="sd15"))
    assert brought == [True]
    code = "import sys\nfrom iteris_sd.ui import jobs\nsys.exit(jobs.device() is not None or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(("public", "seconds"), [(True, limits.MAX_PUBLIC_UPLOAD_SECONDS), (False, 6 * 3600)])
def test_what_strangers_send_does_not_stay_long(
    toy: Path, monkeypatch: pytest.MonkeyPatch, public: bool, seconds: int
) -> None:
    if public:
        monkeypatch.setenv("SPACE_ID", "someone/iteris")
    assert page.build(Visits(Library.shipped())).delete_cache == (600, seconds)


def test_a_public_link_is_as_public_as_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.setenv("ITERIS_SD_PUBLIC", "")
    monkeypatch.delenv("ITERIS_SD_PUBLIC")  # what is set from here on goes with the test
    assert not serving.public()
    serving.go_public()
    assert serving.public() and weights.safety_wanted()
    with pytest.raises(UserError, match="This public page"):
        space.check(recipe(steps=60))
