"""How much work the visitors of a public page may have at once: counted by where they come from, since what a browser
calls its session is free text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, TypeVar

from iteris_sd import limits, serving
from iteris_sd.errors import UserError
from iteris_sd.ui.jobs import Work

W = TypeVar("W", bound=Work)


class Crowd:
    """All work that has not ended, and the address it was asked for from."""

    def __init__(self) -> None:
        self._works: list[tuple[str | None, Work]] = []
        self._lock = threading.Lock()

    def admit(self, address: str | None, make: Callable[[], W], leaving: Work | None = None) -> W:
        """What `make` makes for somebody at an `address`, None where nobody knows it; `leaving` is stopped for it.

        Raises UserError where as much from there has not ended as a public page takes.
        """
        with self._lock:
            self._works = [(whose, work) for whose, work in self._works if not work.ended]
            there = sum(whose == address and work is not leaving for whose, work in self._works)
            if serving.public() and address is not None and there >= (most := limits.MAX_PUBLIC_AT_ONCE):
                raise UserError(
                    f"{there} compositions, merges or looks inside from your network have not ended, and this public "
                    f"page takes {most} at once; wait for one of them, or stop it."
                )
            made = make()
            self._works.append((address, made))
            return made


def address(request: Any) -> str | None:
    """Where a request comes from: an IPv4 address, or the network of an IPv6 one, whose owner has all of it.

    A proxy has a private address, and adds the one that it was asked from to the end of X-Forwarded-For; what stands
    before that anybody may have written. None where no public address is found.
    """
    found = _read(getattr(getattr(request, "client", None), "host", None))
    for entry in reversed(_forwarded(request)):
        if found is None or found.is_global:
            break
        found = _read(entry)
    if found is None or not found.is_global:
        return None
    return str(ip_network((found, 64), strict=False)) if found.version == 6 else str(found)


def _forwarded(request: Any) -> list[str]:
    """The entries of all lines X-Forwarded-For, in their order."""
    headers: Any = getattr(request, "headers", None)
    lines = headers.getlist("x-forwarded-for") if hasattr(headers, "getlist") else []
    return [entry.strip() for line in lines for entry in line.split(",")]


def _read(text: str | None) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(text or "")
    except ValueError:
        return None
    return (found.version == 6 and found.ipv4_mapped) or found
