"""What paused work holds is counted, and lies on disk above a bound, with nothing changed."""

import errno
import gc
import io
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from iteris_sd import limits, spilling
from iteris_sd.calibration import finish, merge
from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA
from iteris_sd.pausing import Pausable
from iteris_sd.spilling import Frontier
from tests.test_any_model import MODELS, kernels
from tests.toys import problem, worst


def test_a_piece_of_work_is_spilled_while_it_stands_and_goes_on_as_if_nothing_were() -> None:
    frontier, found = Frontier(0), list[tuple[Tensor, Tensor, Tensor]]()
    weight = torch.ones(300, 300)

    def work() -> None:
        with frontier.watched("one"):
            a = torch.arange(90_000.0).reshape(300, 300)
            view, turned = a[10:20], weight.t()
            frontier.paused("one")
            piece.pause()
            found.append((view.clone(), turned.sum(), a.sum()))

    piece = Pausable(work)
    piece.resume()
    assert frontier.spilled == frontier.peak == 360_000
    assert weight.untyped_storage().nbytes() == 360_000  # a view of what was made elsewhere is left alone
    piece.resume()
    ((view, turned, total),) = found
    assert torch.equal(view, torch.arange(3_000.0, 6_000.0).reshape(10, 300))
    assert (turned, total) == (90_000, torch.arange(90_000.0).sum())
    frontier.close()


def test_what_is_dead_or_muted_is_not_counted() -> None:
    frontier = Frontier(10**9)
    with frontier.watched("one") as watch:
        kept = torch.ones(50_000)
        kept + 1
        with watch.muted():
            elsewhere = torch.ones(70_000)
        frontier.paused("one")
    assert frontier.peak == kept.untyped_storage().nbytes() == 200_000
    assert elsewhere.sum() == 70_000 and frontier.spilled == 0
    frontier.close()


def test_the_file_has_room_for_what_lies_in_it_and_what_outlives_its_work_gets_its_memory_back() -> None:
    frontier, kept = Frontier(0), list[Tensor]()

    def work() -> None:
        with frontier.watched("one"):
            kept.append(torch.arange(50_000.0))
            for _ in range(5):
                passing = torch.ones(50_000)
                frontier.paused("one")
                piece.pause()
                assert float(passing.sum()) == 50_000

    piece = Pausable(work)
    for _ in range(5):
        piece.resume()
    assert frontier.spilled == 6 * 200_000 and frontier._end == 2 * 200_000
    assert kept[0].untyped_storage().nbytes() == 0
    piece.resume()
    assert piece.done and kept[0].sum() == torch.arange(50_000.0).sum()


def test_work_given_up_half_way_leaves_whole_what_outlives_it() -> None:
    frontier, kept = Frontier(0), list[Tensor]()

    def work() -> None:
        with frontier.watched("one"):
            kept.append(torch.arange(50_000.0))
            frontier.paused("one")
            piece.pause()

    piece = Pausable(work)
    piece.resume()
    assert kept[0].untyped_storage().nbytes() == 0
    piece.close()
    frontier.close()
    assert kept[0].sum() == torch.arange(50_000.0).sum()


def test_where_one_cannot_be_brought_back_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    frontier, kept = Frontier(0), list[Tensor]()

    def work() -> None:
        with frontier.watched("one"):
            kept.extend(torch.full((50_000,), float(k)) for k in range(3))
            frontier.paused("one")
            piece.pause()

    piece = Pausable(work)
    piece.resume()
    fill, tried = frontier._fill, list[int]()

    def scarce(storage: torch.UntypedStorage, away: Any) -> None:
        tried.append(1)
        if len(tried) == 1:
            raise MemoryError
        fill(storage, away)

    monkeypatch.setattr(frontier, "_fill", scarce)
    piece.close()
    with pytest.raises(MemoryError):
        frontier.close()
    assert len(tried) == 3 and sum(tensor.untyped_storage().nbytes() > 0 for tensor in kept) == 2


def test_an_error_does_not_hold_what_the_work_held() -> None:
    gone = []

    def work() -> None:
        tensor = torch.ones(3)
        gone.append(weakref.ref(tensor))
        raise MemoryError

    gc.disable()  # what only its collector frees is held
    try:
        with pytest.raises(MemoryError):
            Pausable(work).resume()
        assert gone[0]() is None
    finally:
        gc.enable()


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    frontier = Frontier(most=0)
    with (
        pytest.raises(UserError, match="put on the disk either .No space left on device.; make room"),
        frontier.watched("a"),
    ):
        x = torch.ones(100_000)
        frontier.paused("a")
    assert x.sum() == 100_000
    frontier.close()


@pytest.mark.skipif(not os.access("/var/tmp", os.W_OK), reason="there is no /var/tmp here")
def test_the_file_is_no_memory_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert spilling._folder() == "/var/tmp"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert spilling._folder() is None


@pytest.mark.parametrize("name", MODELS)
def test_a_sweep_that_spills_everything_ends_as_one_that_spills_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = MODELS[name]()
    loras, batches = problem(toy, (2, 3))
    loras = [LoRA(lora, kernels(toy)) for lora in loras]
    wanted = finish(merge(toy.modules, loras, toy.samples(batches, 2), "iteris"))
    monkeypatch.setattr(limits, "MAX_FRONTIER_BYTES", 0)
    monkeypatch.setattr(spilling, "SMALL", 1)
    found = finish(merge(toy.modules, loras, toy.samples(batches, 2), "iteris"))
    assert found.frontier == wanted.frontier > 0
    assert worst(found.lora, wanted.lora) == 0.0
