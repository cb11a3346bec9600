"""Recipes of a base model at a path: another one may be given for it, and what to do is told where it is not known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from iteris_sd import bases
from iteris_sd.cli import app, asking
from iteris_sd.errors import UserError
from iteris_sd.history import History
from iteris_sd.recipe import Recipe

ASKED: dict[str, Any] = {"concepts": [{"name": "wolf"}], "prompt": "a {0}"}


@pytest.fixture
def mine(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model of one's own; none at a path is known yet."""
    folder = Path(shutil.copytree(toy / "storybook", tmp_path / "mine"))
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "cross_attention_dim": 128}))
    monkeypatch.setattr(bases, "BASES", dict(bases.BASES))
    return folder


def recipe_of(folder: Path, base: Any) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps({**ASKED, "base": base}))
    return path


@pytest.mark.parametrize("stored", ["gone.safetensors", "/no/where/gone.safetensors", "mine", 7])
def test_a_base_that_is_given_takes_the_place_of_the_recipe_s(
    mine: Path, tmp_path: Path, stored: Any
) -> None:
    path = recipe_of(tmp_path, stored)
    assert asking.told(path, str(mine)).base == str(mine)
    words = ("compose", "--recipe", str(path), "--base", str(mine), "--output", str(tmp_path / "out"))
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2 and result.stderr.startswith("There is no concept 'wolf'")


def test_a_recipe_s_base_that_is_not_there_is_asked_for(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="There is no base model 'gone.safetensors'.* say --base and that path"
    ):
        asking.told(recipe_of(tmp_path, "gone.safetensors"), None)
    assert asking.told(recipe_of(tmp_path, str(mine)), None).base == str(mine)
    with pytest.raises(
        UserError, match=r"^There is no base model 'sdxl'; choose one of [^.]*v1-5[^>]*noVAE\.$"
    ):
        asking.told(recipe_of(tmp_path, str(mine)), "sdxl")


@pytest.mark.parametrize("name", ["mine", "/home/me/mine"])
def test_the_history_says_how_a_composition_of_such_a_base_is_opened(
    mine: Path, tmp_path: Path, name: str
) -> None:
    history = History(tmp_path / "history")
    bases.add(bases.like(bases.BASES["storybook"], name=name, title="mine", source=str(mine), download=""))
    entry = history.keep(Recipe.of({**ASKED, "base": name}), None, [], "done")
    assert entry.recipe().base == name
    del bases.BASES[name]
    with pytest.raises(
        UserError, match="the base model 'mine', which is not known now; start with --base and the"
    ):
        entry.recipe()
    (entry.folder / "recipe.json").write_text("{")
    with pytest.raises(UserError, match="recipe.json carries a broken recipe"):
        entry.recipe()
