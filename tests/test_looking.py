"""What is inside a concept: its file is read once, and one file at a time, while the page goes on."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iteris_sd import formats, inspecting
from iteris_sd.concepts import Library
from iteris_sd.history import History
from iteris_sd.kept import Kept
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.ui import heavy, shelf
from iteris_sd.ui.visits import Visits

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
SOMEBODY: Any = SimpleNamespace(session_hash="a")
MANY = 6


class Reader:
    """`inspecting.describe`, slowed down, which counts how often it is called, and how often at once."""

    def __init__(self) -> None:
        self.calls = self.now = self.most = 0
        self.pause, self._describe = 0.0, inspecting.describe
        self._lock = threading.Lock()

    def __call__(self, path: Path) -> inspecting.Description:
        with self._lock:
            self.calls, self.now = self.calls + 1, self.now + 1
            self.most = max(self.most, self.now)
        time.sleep(self.pause)
        with self._lock:
            self.now -= 1
        return self._describe(path)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    reader = Reader()
    heavy.bring_in()
    monkeypatch.setattr(inspecting, "describe", reader)
    shelf._described.cache_clear()
    yield reader
    shelf._described.cache_clear()


@pytest.fixture
def visits(tmp_path: Path, toy: Path) -> Visits:
    """One's own page, with a few concepts: dog-1, dog-2 …"""
    lora = LoRA({TO_K: LowRank(torch.ones(2, 768), torch.ones(320, 2))})
    visits = Visits(Library({}), Kept(tmp_path / "concepts"), History(tmp_path / "history"))
    for k in range(MANY):
        formats.write(tmp_path / f"my-{k}.safetensors", lora, {})
        visits.of(SOMEBODY).add([tmp_path / f"my-{k}.safetensors"], {"title": f"my {k}"})
    return visits


def test_a_file_is_read_again_only_when_it_has_changed(visits: Visits, reader: Reader) -> None:
    concept = visits.of(SOMEBODY).library.concepts["my-1"]
    told = [shelf.inside(concept) for _ in range(3)]
    assert reader.calls == 1 and told[0] == told[2] and "rank 2" in told[0]
    formats.write(concept.lora, LoRA({TO_K: LowRank(torch.ones(3, 768), torch.ones(320, 3))}), {})
    assert "rank 3" in shelf.inside(concept) and reader.calls == 2
    os.utime(concept.lora, ns=(1, 1))
    assert "rank 3" in shelf.inside(concept) and reader.calls == 3
    with suppress(FileNotFoundError):
        concept.lora.unlink()
    assert "problem" in shelf.inside(concept)


def test_who_waits_for_a_file_keeps_no_other_event_waiting(visits: Visits, reader: Reader) -> None:
    look, reader.pause = shelf._look(visits), 0.05

    async def all_at_once() -> tuple[list[str], int]:
        looks = [asyncio.ensure_future(look(f"my-{k}", SOMEBODY)) for k in range(MANY)]
        others = 0
        while not all(one.done() for one in looks):
            await asyncio.sleep(0.01)
            others += 1
        return [one.result() for one in looks], others

    told, others = asyncio.run(all_at_once())
    assert all("rank 2" in one for one in told) and others > MANY
    assert (reader.calls, reader.most) == (MANY, 1)


def test_what_is_brought_is_read_one_at_a_time_too(visits: Visits, tmp_path: Path) -> None:
    """The same room in memory: keeping and guessing wait for each other, and for who looks inside."""
    from iteris_sd.ui.visits import READING

    visit, told = visits.of(SOMEBODY), []
    brought = [
        lambda: visit.look_at([tmp_path / "my-0.safetensors"]),
        lambda: visit.add([tmp_path / "my-0.safetensors"], {"title": "more"}),
    ]
    threads = [threading.Thread(target=lambda bring=bring: told.append(bring())) for bring in brought]
    with READING:
        for thread in threads:
            thread.start()
            thread.join(0.3)
        assert not told
    for thread in threads:
        thread.join(20)
    assert len(told) == 2
