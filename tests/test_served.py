"""Which files the launched page serves: what is shown, and what is downloaded; nothing else of a visit."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch

from iteris_sd import formats
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.ui import page
from iteris_sd.ui.visits import Visits

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
SESSION = "a"
SOMEBODY: Any = SimpleNamespace(session_hash=SESSION)


@pytest.fixture
def served(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Visits]]:
    """The page as strangers find it: its address and its visits."""
    made: list[Any] = []
    launch = gr.Blocks.launch

    def begin(blocks: gr.Blocks, **how: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch(
            blocks,
            **{**how, "server_port": port, "server_name": "127.0.0.1"},
            prevent_thread_lock=True,
            quiet=True,
        )
        made.append(blocks)

    class Noted(Visits):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(page.jobs, "load", lambda base: None)
    monkeypatch.setattr(page, "Visits", Noted)
    monkeypatch.setattr(gr.Blocks, "launch", begin)
    page.launch()
    visits, blocks = made
    yield blocks.local_url.rstrip("/"), visits
    blocks.close(verbose=False)


def fetched(url: str, sent: Any = None) -> tuple[int, bytes]:
    """Status and content."""
    data = None if sent is None else json.dumps(sent).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_a_link_to_a_picture_leads_to_nothing_else_and_downloads_are_served(
    served: tuple[str, Visits], tmp_path: Path
) -> None:
    url, visits = served
    visit = visits.of(SOMEBODY)
    path = tmp_path / "dog.safetensors"
    formats.write(path, LoRA({TO_K: LowRank(torch.ones(2, 768), torch.ones(320, 2))}), {})
    name = visit.add([path], {"title": "Rex"}).name
    picture = visit._fresh("run-") / "linear_seed0.png"
    picture.write_bytes(b"a picture")
    assert fetched(f"{url}/gradio_api/file={picture}") == (200, b"a picture")

    events = {"show_library": [], "show_own": [name]}
    for event, data in events.items():
        status, told = fetched(f"{url}/gradio_api/run/{event}", {"data": data, "session_hash": SESSION})
    link = re.search(r'"url": ?"(\S+?\.zip)"', told.decode())
    assert status == 200 and link is not None
    status, content = fetched(link[1])
    assert status == 200 and content == visit.export(name).read_bytes()

    of_concepts = [file for file in visits.root.rglob("*") if file.is_file() and file != picture]
    assert {file.suffix for file in of_concepts} == {".json", ".safetensors", ".zip"}
    assert {fetched(f"{url}/gradio_api/file={file}")[0] for file in of_concepts} == {403}
    assert not any(
        step in str(file) for file in of_concepts for step in picture.relative_to(visits.shown).parts
    )
