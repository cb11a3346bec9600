"""How much work visitors of a public page have at once, counted by where they come from and not by what they say."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import Headers

from iteris_sd import limits
from iteris_sd.concepts import Concept, Library
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe
from iteris_sd.ui import crowd, jobs
from iteris_sd.ui.visits import Visit, Visits

LIBRARY = Library({"dog": Concept("dog", "Rex", "<rex> dog", "dog", Path("x.safetensors"))})
RECIPE = Recipe.of({"concepts": [{"name": "dog"}], "prompt": "a {0}", "steps": 2})
PROXY, CLIENT, OTHER = "10.16.3.80", "93.184.216.34", "8.8.8.8"


def asking(session: str, host: str | None, *forwarded: str) -> Any:
    headers = Headers(raw=[(b"x-forwarded-for", line.encode()) for line in forwarded])
    client = None if host is None else SimpleNamespace(host=host)
    return SimpleNamespace(session_hash=session, client=client, headers=headers)


@pytest.mark.parametrize(
    ("host", "forwarded", "found"),
    [
        (CLIENT, (), CLIENT),
        (CLIENT, (OTHER,), CLIENT),  # who is asked from nearby needs no header, and writes what he likes
        (PROXY, (CLIENT,), CLIENT),
        (PROXY, (f"{OTHER}, {CLIENT}",), CLIENT),
        (PROXY, (OTHER, CLIENT), CLIENT),
        (PROXY, (f"{OTHER}, {CLIENT}, 10.0.0.7",), CLIENT),  # two proxies
        (PROXY, (f"{OTHER}, nonsense",), None),
        (PROXY, (), None),
        (PROXY, ("192.168.1.4",), None),
        (None, (CLIENT,), None),
        ("testclient", (), None),
        ("::ffff:8.8.8.8", (), OTHER),
        ("2a00:1450:4001:82a::200e", (), "2a00:1450:4001:82a::/64"),
        ("::1", (f"{OTHER}, 2a00:1450:4001:82a:1:2:3:4",), "2a00:1450:4001:82a::/64"),
    ],
)
def test_an_address_is_the_one_that_the_last_proxy_saw(
    host: str | None, forwarded: tuple[str, ...], found: str | None
) -> None:
    assert crowd.address(asking("a", host, *forwarded)) == found


def test_a_request_that_says_nothing_comes_from_nowhere() -> None:
    assert crowd.address(SimpleNamespace(session_hash="a")) is None


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A public page whose work does nothing until it is let go."""
    go = threading.Event()
    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    monkeypatch.setattr(jobs.Work, "_begin", lambda work: go.wait(10))
    return go


@pytest.mark.parametrize("kind", ["begin", "compose", "merge", "look_inside"])
def test_one_address_has_so_much_work_at_once_whatever_its_sessions_are_called(
    kind: str, go: threading.Event
) -> None:
    visits, most = Visits(LIBRARY), limits.MAX_PUBLIC_AT_ONCE

    def start(visit: Visit) -> jobs.Work:
        work: jobs.Work = getattr(visit, kind)(RECIPE)
        return work

    begun = [start(visits.of(asking(f"{k}", PROXY, f"1.1.1.{k}, {CLIENT}"))) for k in range(most)]
    refused = visits.of(asking("more", PROXY, CLIENT))
    with pytest.raises(
        UserError, match=f"{most} compositions, .* from your network .* takes {most} at once; wait"
    ):
        start(refused)
    assert not refused.holds and not refused.busy
    start(visits.of(asking("other", PROXY, OTHER)))
    for k in range(most + 1):
        start(visits.of(asking(f"unknown {k}", PROXY)))  # whose address nobody knows
    go.set()
    assert all(work.wait(10) for work in begun)
    assert start(refused).wait(10)


def test_who_composes_anew_has_no_more_than_before(go: threading.Event) -> None:
    visits = Visits(LIBRARY)
    pages = [visits.of(asking(f"{k}", CLIENT)) for k in range(limits.MAX_PUBLIC_AT_ONCE)]
    for page in pages:
        page.begin(RECIPE)
    first = pages[0].job
    assert pages[0].begin(RECIPE) is not first
    go.set()


def test_one_s_own_page_does_as_much_as_one_likes(
    go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPACE_ID")
    visits = Visits(LIBRARY)
    for k in range(limits.MAX_PUBLIC_AT_ONCE + 2):
        visits.of(asking(f"{k}", CLIENT)).begin(RECIPE)
    go.set()
