"""What comes in: how large a request may be, what an upload may hold, and which of Gradio's routes stay closed."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import suppress
from pathlib import Path

import gradio as gr
from gradio import processing_utils
from gradio.utils import get_upload_folder
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iteris_sd import hub, limits, serving
from iteris_sd.ui import room

_UPLOAD = "/gradio_api/upload"
# Of a public page: cutting screen recordings, storing a link to a session on disk, and fetching any address for anyone.
_CLOSED = tuple(f"/gradio_api/{route}" for route in ("process_recording", "deep_link", "file=http"))
_LOOK_EVERY = 64 * 1024**2  # bytes of an upload between two looks at the room that is left


def take_no_addresses() -> None:
    """From now on an address in place of a file is refused with a sentence.

    Gradio would download it, whole into memory and however large, for any event and before the event's own checks.
    """

    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error(
            "A file was given by its address, which this page does not fetch; download it, then upload it here.",
            print_exception=False,
        )

    processing_utils.async_ssrf_protected_download = refuse  # all of Gradio's downloads come through it


class _Refused(MultiPartException):
    """What is told in place of an answer; of this kind, since Gradio then removes what it wrote of an upload."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Door:
    """ASGI middleware between the network and Gradio.

    A request that is too large is answered with status 413, an upload with other things than files with 400, and one
    that a public page has no room for with 507; closed routes with 404. `visitors`: the folder of all visits, which
    counts as room that is taken.
    """

    def __init__(self, app: ASGIApp, visitors: Path) -> None:
        self._app, self._visitors = app, visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, and end it where more comes than may."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if serving.public() and path.startswith(_CLOSED):
            await PlainTextResponse("Not found", 404)(scope, receive, send)
            return
        refused: list[_Refused] = []
        answering = False

        async def hear() -> Message:
            if refused:
                raise refused[0]
            message = await receive()
            try:
                await body.take(message)
            except _Refused as error:
                refused.append(error)
                raise
            return message

        async def say(message: Message) -> None:
            nonlocal answering
            if answering or not refused:  # what the app makes of a refusal is not what is told
                answering = True
                await send(message)

        try:
            body = _body(Headers(scope=scope), path, self._visitors)
            await self._app(scope, hear, say)
        except _Refused as error:
            refused.append(error)
        if refused and not answering:
            await PlainTextResponse(refused[0].message, refused[0].status)(scope, receive, send)


def _body(headers: Headers, path: str, visitors: Path) -> _Body:
    """What to make of a request's body. Raises _Refused where its length is told and too large."""
    kind, options = parse_options_header(headers.get("Content-Type"))
    boundary = options.get(b"boundary") if path == _UPLOAD and kind == b"multipart/form-data" else None
    body = _Upload(boundary, visitors) if boundary else _Body(limits.MAX_REQUEST_BYTES)
    told = headers.get("Content-Length", "")
    if told.isdecimal():
        body.check(int(told))
    return body


class _Body:
    """The body of a request as it comes: `most` bytes, however many it says to have."""

    def __init__(self, most: int) -> None:
        self._most, self._received = most, 0

    def check(self, size: int) -> None:
        """Raise _Refused when it is larger than it may be."""
        if size > self._most:
            raise _Refused(
                413, f"This is more than {hub.readable(self._most)}, which is as much as can be sent at once."
            )

    async def take(self, message: Message) -> None:
        """Count a piece of it. Raises _Refused."""
        self._received += len(message.get("body", b""))
        self.check(self._received)


class _Upload(_Body):
    """An upload as it comes: files only, as many as can be brought at once, and as long as there is room.

    Gradio would collect any other field in memory, and keep a file under another name for good.
    """

    def __init__(self, boundary: bytes, visitors: Path) -> None:
        super().__init__(limits.MAX_PUBLIC_BYTES if serving.public() else limits.MAX_UPLOAD_BYTES)
        self._visitors, self._files, self._look_at, self._ended = visitors, 0, 0, False
        self._name = self._value = self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._hear_name,
                "on_header_value": self._hear_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._check_part,
            },
        )

    async def take(self, message: Message) -> None:
        """Look at a piece of it. Raises _Refused, also when it is broken off: Gradio would keep what it has of it."""
        if message["type"] == "http.disconnect" and not self._ended:
            raise _Refused(400, "The upload was broken off; begin it again.")
        await super().take(message)
        if self._received >= self._look_at:
            self._look_at = self._received + _LOOK_EVERY
            await asyncio.to_thread(_make_room, self._visitors)
        try:
            self._parser.write(message.get("body", b""))
        except MultipartParseError as error:
            raise _Refused(400, f"The upload cannot be read: {error}.") from error
        self._ended = not message.get("more_body", False)

    def _begin_part(self) -> None:
        self._name = self._value = self._disposition = b""

    def _hear_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _hear_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _check_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != b"files" or b"filename" not in options:
            raise _Refused(
                400, "An upload holds files only, each in a field named “files” with its file's name."
            )
        self._files += 1
        if self._files > (most := limits.MAX_BROUGHT):
            raise _Refused(413, f"At most {most} files can be uploaded at once; bring fewer.")


def _make_room(visitors: Path) -> None:
    """Remove what broken uploads left. Raises _Refused when a public page has no room for more."""
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    if not serving.public():
        return
    full = room.bytes_of([visitors, folder]) > limits.MAX_PUBLIC_BYTES_IN_ALL
    if full or shutil.disk_usage(folder).free < limits.MIN_PUBLIC_FREE_BYTES:
        raise _Refused(
            507,
            "This public page has no room for more uploads; try again later, or run the page on a machine of your own.",
        )


def sweep(folder: Path) -> None:
    """Remove files that uploads left in part an hour ago in Gradio's `folder`; Gradio knows of none of them."""
    long_ago = time.time() - limits.MAX_STRAY_SECONDS
    for file in folder.glob("tmp*"):
        with suppress(OSError):
            if file.is_file() and file.stat().st_mtime < long_ago:
                file.unlink()
