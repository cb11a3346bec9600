"""What comes to the page from outside: addresses, bodies and uploads without end, routes that nobody needs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import httpx
import pytest

from iteris_sd import limits, serving
from iteris_sd.ui import door, page

UPLOAD = "/gradio_api/upload"
ADDRESS = {"path": "https://example.invalid/bomb", "meta": {"_type": "gradio.FileData"}}
ONE = [("files", ("recipe.json", b"{}"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Gradio keeps what is uploaded."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def blocks(folder: Path) -> Iterator[gr.Blocks]:
    """The page as it is launched, served from this process."""
    begun: list[gr.Blocks] = []
    launch = gr.Blocks.launch

    def background(blocks: gr.Blocks, **how: object) -> None:
        begun.append(blocks)
        launch(blocks, **how, prevent_thread_lock=True, quiet=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setattr(gr.Blocks, "launch", background)
        page.launch()
        yield begun[0]
    begun[0].close()


@pytest.fixture
def client(blocks: gr.Blocks) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=blocks.local_url, timeout=30) as client:
        yield client


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the page were public."""
    monkeypatch.setattr(serving, "public", lambda: True)


def strays(folder: Path) -> list[Path]:
    """What is left of uploads that were not taken."""
    return list(folder.glob("tmp*"))


# ---------------------------------------------------------------- addresses


def test_a_file_given_by_its_address_is_not_fetched(client: httpx.Client) -> None:
    asked = {"data": [[ADDRESS], "x"], "session_hash": "a"}
    answer = client.post("/gradio_api/run/show_prompt", json=asked)
    assert "download it, then upload it here" in answer.json()["error"]


def test_nor_by_what_waits_in_the_queue(client: httpx.Client) -> None:
    event = client.post("/gradio_api/call/v2/compose", json={"concepts": [ADDRESS], "prompt": "x"}).json()
    told = client.get(f"/gradio_api/call/compose/{event['event_id']}").text
    assert told.startswith("event: error") and "download it, then upload it here" in told


# ---------------------------------------------------------------- bodies


def pieces(size: int) -> Iterator[bytes]:
    """A body that does not say how long it is."""
    for _ in range(size // 1024):
        yield b" " * 1024


@pytest.mark.parametrize("route", ["run/show_prompt", "queue/join", "upload", "component_server"])
@pytest.mark.parametrize("told", [True, False], ids=["length told", "length not told"])
def test_a_request_is_no_longer_than_a_form_needs(client: httpx.Client, route: str, told: bool) -> None:
    size = 2 * limits.MAX_REQUEST_BYTES
    body = b" " * size if told else pieces(size)
    answer = client.post(
        f"/gradio_api/{route}",
        content=body,
        headers={"Content-Type": "application/json", "Connection": "close"},
    )
    if route == "upload" and not told:
        assert answer.status_code == 400  # refused for its kind before anything is read
    else:
        assert answer.status_code == 413 and "more than 131 kB" in answer.text


def test_the_longest_form_is_taken(client: httpx.Client) -> None:
    path = "/tmp/gradio/" + "x" * 64 + "/" + "y" * 240
    files = [{"path": path, "url": path, "orig_name": "y" * 240} for _ in range(limits.MAX_BROUGHT)]
    asked = {"data": [[], "p" * limits.MAX_PROMPT_CHARS], "event_data": files, "session_hash": "b"}
    assert client.post("/gradio_api/run/show_prompt", json=asked).status_code == 200


# ---------------------------------------------------------------- uploads


def test_files_are_taken(client: httpx.Client, folder: Path) -> None:
    many = [("files", (f"{k}.json", b"{}")) for k in range(limits.MAX_BROUGHT)]
    paths = client.post(UPLOAD, files=many).json()
    assert len(paths) == limits.MAX_BROUGHT and all(Path(path).read_bytes() == b"{}" for path in paths)
    assert strays(folder) == []


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ([*ONE, ("other", ("x.bin", b"x"))], 400, "in a field named “files”"),
        ([*ONE, ("files", (None, b"x" * 1000))], 400, "in a field named “files”"),
        (ONE * (limits.MAX_BROUGHT + 1), 413, f"At most {limits.MAX_BROUGHT} files"),
    ],
    ids=["under another name", "no file", "too many"],
)
def test_nothing_else_is_taken_and_nothing_of_it_is_left(
    client: httpx.Client, folder: Path, fields: list, status: int, said: str
) -> None:
    answer = client.post(UPLOAD, files=fields)
    assert answer.status_code == status and said in answer.text
    assert strays(folder) == []


@pytest.mark.parametrize("told", [True, False], ids=["length told", "length not told"])
def test_uploads_have_a_bound_together(
    client: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    monkeypatch.setattr(limits, "MAX_UPLOAD_BYTES", 100_000)
    request = client.build_request(
        "POST", UPLOAD, files=[("files", (f"{k}", b"x" * 30_000)) for k in range(9)]
    )
    body = request.read()
    if not told:
        request = client.build_request(
            "POST",
            UPLOAD,
            content=(body[k : k + 8192] for k in range(0, len(body), 8192)),
            headers={"Content-Type": request.headers["Content-Type"]},
        )
    answer = client.send(request)
    assert answer.status_code == 413 and "more than 100 kB" in answer.text
    assert strays(folder) == []


def test_nothing_is_left_of_an_upload_that_is_broken_off(blocks: gr.Blocks, folder: Path) -> None:
    there = urlsplit(blocks.local_url)
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n' + b"x" * 10_000
    head = f"POST {UPLOAD} HTTP/1.1\r\nHost: {there.netloc}\r\nContent-Length: 99999\r\n"
    with socket.create_connection((there.hostname, there.port)) as line:
        line.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + part)
        _wait(lambda: strays(folder) != [])
    _wait(lambda: strays(folder) == [])


def _wait(done) -> None:
    until = time.monotonic() + 10
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_a_crash_left_goes_with_the_next_upload(client: httpx.Client, folder: Path) -> None:
    old, young, kept = folder / "tmp1234abcd", folder / "tmp5678abcd", folder / "abcd"
    for file in (old, young, kept):
        file.write_bytes(b"x")
    long_ago = time.time() - limits.MAX_STRAY_SECONDS - 10
    for file in (old, kept):
        os.utime(file, (long_ago, long_ago))
    assert client.post(UPLOAD, files=ONE).status_code == 200
    assert not old.exists() and young.exists() and kept.exists()
    young.unlink()


def _no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PUBLIC_BYTES_IN_ALL", 0)


def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))


@pytest.mark.parametrize("fill", [_no_bytes, _no_disk], ids=["of visitors' files", "of anything"])
def test_a_full_public_page_takes_no_upload(
    client: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch, fill
) -> None:
    assert client.post(UPLOAD, files=ONE).status_code == 200
    fill(monkeypatch)
    assert client.post(UPLOAD, files=ONE).status_code == 200  # it is one's own
    monkeypatch.setattr(serving, "public", lambda: True)
    answer = client.post(UPLOAD, files=ONE)
    assert answer.status_code == 507 and "no room for more uploads" in answer.text
    assert strays(folder) == []


def test_a_long_upload_is_looked_at_on_its_way(
    client: httpx.Client, folder: Path, strangers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_LOOK_EVERY", 100_000)
    monkeypatch.setattr(limits, "MAX_PUBLIC_BYTES_IN_ALL", door.room.bytes_of([folder]) + 200_000)
    answer = client.post(UPLOAD, files=[("files", ("x", b"x" * 2_000_000))])
    assert answer.status_code == 507
    assert strays(folder) == []


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize(
    ("method", "route", "own"),
    [
        ("POST", "process_recording", 400),
        ("GET", "deep_link?session_hash=nobody", 200),
        ("GET", "file=http://127.0.0.1:9/x", 403),
        ("HEAD", "file=https://127.0.0.1:9/x", 403),
        ("GET", "file=%68ttp://127.0.0.1:9/x", 403),
    ],
)
def test_routes_that_nobody_needs_are_closed_to_strangers(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, method: str, route: str, own: int
) -> None:
    assert client.request(method, f"/gradio_api/{route}").status_code == own
    monkeypatch.setattr(serving, "public", lambda: True)
    assert client.request(method, f"/gradio_api/{route}").status_code == 404


def test_what_waits_in_the_queue_cannot_be_asked_past_it(client: httpx.Client) -> None:
    asked = {"data": [["dog", "barn"], "a {0}"], "session_hash": "c"}
    for route in ("run/compose", "api/merge", "run/compose/"):
        answer = client.post(f"/gradio_api/{route}", json=asked)
        assert answer.status_code == 404 and "join the queue" in answer.text
    answer = client.post("/gradio_api/run/show_prompt", json={"data": [[], "a dog"], "session_hash": "c"})
    assert answer.status_code == 200 and "a dog" in json.dumps(answer.json()["data"])


def test_gradio_keeps_little_of_those_who_were_there(blocks: gr.Blocks, client: httpx.Client) -> None:
    assert blocks.state_holder.capacity == limits.MAX_SESSIONS >= limits.MAX_VISITS
    assert client.get("/gradio_api/runs").status_code == 404
