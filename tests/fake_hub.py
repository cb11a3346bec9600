"""A Hub on this machine: serves repositories as the Hugging Face Hub does, and its faults to order.

Large files (.safetensors, .bin) lie on another host, as the Hub's do: asked for at the Hub, they are redirected
there. Where `xet` is set they lie in Xet storage instead, a folder that hf_xet reads and writes by itself.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

PIECE = 16 * 1024


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class FakeHub:
    """`repos`: owner/name -> file -> content. What is wrong with it is set from outside."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)  # repositories whose files are refused
    down: int = 0  # the error that everything is answered with
    cut: int | None = None  # bytes after which a large file's line breaks
    pause: float = 0.0  # seconds after each piece
    ranges: bool = True  # whether a part of a file can be asked for
    nonsense: bool = False  # whether a login page answers instead
    xet: Path | None = None  # the folder of large files in Xet storage
    asked: list[Asked] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def stand_in(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Be the Hub for whoever asks for it, with a cache in this folder."""
        patch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)

    @property
    def store(self) -> str:
        """The address of the host with the large files."""
        return f"http://localhost:{self.port}/store"

    def commit(self, repo: str) -> str:
        """The hash of its only commit."""
        content = "".join(f"{name}{etag(name, data)}" for name, data in self.repos[repo].items())
        return hashlib.sha1(content.encode()).hexdigest()

    @property
    def xet_endpoint(self) -> str:
        """The address of Xet storage, as hf_xet has it for a folder."""
        return f"local://{self.xet}"

    def stored_by_xet(self, data: bytes) -> str:
        """Put a file's content into Xet storage; the hash it is asked for by there."""
        from hf_xet import XetSession

        with XetSession().new_upload_commit(endpoint=self.xet_endpoint) as commit:
            upload = commit.start_upload_bytes(data)
        return str(upload.result().xet_info.hash)

    def served(self, path: str = "/store/") -> list[str]:
        """The ranges that were asked for, of what lies under `path`."""
        return [
            one.headers.get("range", "") for one in self.asked if one.method == "GET" and path in one.path
        ]

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Serve within the block."""
        hub = self

        class Handler(_Handler):
            fake = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def is_large(name: str) -> bool:
    """Whether it is kept apart from git."""
    return name.endswith((".safetensors", ".bin"))


def etag(name: str, data: bytes) -> str:
    """What the Hub calls a file's content."""
    if is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the other side left
            self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.fake.asked.append(Asked(self.command, path, headers))
        if self.fake.nonsense:
            self._send(200, b"<html>Welcome to the hotel", {"Content-Type": "text/html"})
        elif self.fake.down:
            self._send(self.fake.down)
        elif path.startswith("/store/"):
            self._stored(path.rpartition("/")[2])
        elif path == "/xet-token":
            headers = {"X-Xet-Cas-Url": self.fake.xet_endpoint, "X-Xet-Access-Token": "xet_secret"}
            self._send(200, headers=headers | {"X-Xet-Token-Expiration": str(int(time.time()) + 3600)})
        elif path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._info(repo, revision or "main")
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._file(repo, revision, name)

    def _known(self, repo: str, revision: str) -> bool:
        if repo not in self.fake.repos:
            self._send(404, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", self.fake.commit(repo)):
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _info(self, repo: str, revision: str) -> None:
        if not self._known(repo, revision):
            return
        siblings = [_sibling(name, data) for name, data in self.fake.repos[repo].items()]
        info = {"id": repo, "sha": self.fake.commit(repo), "siblings": siblings}
        self._send(200, json.dumps(info).encode())

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not self._known(repo, revision):
            return
        if repo in self.fake.gated:
            self._send(403, headers={"X-Error-Code": "GatedRepo"})
            return
        data = self.fake.repos[repo].get(name)
        if data is None:
            self._send(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        tag = etag(name, data)
        headers = {"X-Repo-Commit": self.fake.commit(repo), "ETag": f'"{tag}"'}
        if is_large(name):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{tag}"'}
            if self.fake.xet is not None:
                headers |= {
                    "X-Xet-Hash": self.fake.stored_by_xet(data),
                    "X-Xet-Refresh-Route": f"{self.fake.endpoint}/xet-token",
                }
            self._send(302, headers=headers | {"Location": f"{self.fake.store}/{tag}"})
        else:
            self._send_part(data, headers)

    def _stored(self, tag: str) -> None:
        contents = (data for files in self.fake.repos.values() for data in files.values())
        data = next(data for data in contents if hashlib.sha256(data).hexdigest() == tag)
        self._send_part(data, {"ETag": f'"{tag}"'}, breaking=True)

    def _send_part(self, data: bytes, headers: Mapping[str, str], breaking: bool = False) -> None:
        """Send a file, or what was asked of it, piece by piece."""
        wanted = self.headers.get("Range", "") if self.fake.ranges else ""
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0)
        if wanted and start >= len(data) > 0:
            self._send(416)
            return
        body = data[start:]
        self._head(206 if wanted else 200, len(body), headers)
        if self.command == "HEAD":
            return
        cut = self.fake.cut
        broken = breaking and cut is not None and cut < len(body)
        if broken:
            body = body[:cut]
        for at in range(0, len(body), PIECE):
            self.wfile.write(body[at : at + PIECE])
            time.sleep(self.fake.pause)
        self.close_connection = self.close_connection or broken

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self._head(status, len(body), headers or {})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub's list of a repository has it."""
    sibling = {"rfilename": name, "size": len(data), "blobId": etag("", data)}
    if not is_large(name):
        return sibling
    return sibling | {"lfs": {"size": len(data), "sha256": etag(name, data), "pointerSize": 134}}
