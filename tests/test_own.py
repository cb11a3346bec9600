"""A person's own concepts on the page: what is shown of the one that is chosen, and how it is removed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch

from iteris_sd import bases, formats
from iteris_sd.concepts import Library
from iteris_sd.history import History
from iteris_sd.kept import Kept
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.ui import compose, own
from iteris_sd.ui.own import Own
from iteris_sd.ui.visits import Visits

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
SOMEBODY: Any = SimpleNamespace(session_hash="a")


@pytest.fixture
def visits(tmp_path: Path, toy: Path) -> Visits:
    """One's own page, with a concept called "My dog"."""
    path = tmp_path / "dog.safetensors"
    formats.write(path, LoRA({TO_K: LowRank(torch.ones(2, 768), torch.ones(320, 2))}), {})
    words = {"title": "My dog", "trigger": "<rex> dog", "class_noun": "dog", "weight": 1.0}
    visits = Visits(Library({}), Kept(tmp_path / "concepts"), History(tmp_path / "history"))
    visits.of(SOMEBODY).add([path], words)
    return visits


@pytest.fixture
def widgets() -> Own:
    with gr.Blocks():
        return own.layout()


@pytest.mark.parametrize("chosen", ["my-dog", ""])
def test_what_is_left_of_another_try_goes_when_a_concept_is_chosen(
    visits: Visits, widgets: Own, chosen: str
) -> None:
    shown = own._show(visits, widgets)(chosen, SOMEBODY)
    assert shown[widgets.files] is None and shown[widgets.told] == ""
    assert shown[widgets.title] == ("My dog" if chosen else "")
    assert shown[widgets.remove].visible is bool(chosen)


def test_a_concept_is_removed_when_that_is_asked_for_twice_and_called_by_its_title(
    visits: Visits, widgets: Own
) -> None:
    with gr.Blocks():
        tab = compose.layout(visits, bases.find("storybook"), gr.HTML())
        remove = own._remove(visits, tab.form, widgets, gr.Dropdown())
    asked = remove("my-dog", "", [], "storybook", SOMEBODY)
    assert "my-dog" in visits.of(SOMEBODY).mine()
    assert asked[widgets.remove].value == "Remove for good?" and asked[widgets.sure] == "my-dog"
    assert own._show(visits, widgets)("my-dog", SOMEBODY)[widgets.sure] == ""  # choosing anew forgets it
    gone = remove("my-dog", asked[widgets.sure], [], "storybook", SOMEBODY)
    assert "Removed: My dog." in gone[widgets.told] and not visits.of(SOMEBODY).mine()
    assert gone[widgets.sure] == "" and gone[widgets.remove].visible is False
