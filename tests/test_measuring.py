"""Measuring where the system does not tell."""

import importlib.util
from typing import Any

import pytest

from iteris_sd.benchmarks import measuring
from iteris_sd.errors import UserError


def test_a_system_that_tells_no_peak_is_told_of_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "resource" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr(measuring.torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match="Peak memory of a process cannot be measured on .*; run the benchmark on"
    ):
        measuring.peak_bytes(str, str)


def test_nothing_is_imported_that_windows_lacks() -> None:
    assert not hasattr(measuring, "resource")
