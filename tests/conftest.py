"""What several test files need: the toy base model in place of the shipped one."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may look for a model on the network

from collections.abc import Iterator
from pathlib import Path

import pytest

from iteris_sd import backbone as backbones
from iteris_sd.backbone import Backbone
from tests import toybook


@pytest.fixture(scope="session")
def toy_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `assets/`, with a tiny random base model and three concepts."""
    assets = tmp_path_factory.mktemp("assets")
    toybook.write(assets)
    return assets


@pytest.fixture
def toy(toy_assets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The toy assets in place of the shipped ones, for whoever asks by name."""
    toybook.install(toy_assets, monkeypatch)
    yield toy_assets
    backbones.load.cache_clear()


@pytest.fixture
def backbone(toy: Path) -> Backbone:
    """The toy base model."""
    return backbones.load("storybook")
