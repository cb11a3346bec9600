"""A compiled U-Net draws what a plain one draws, is not compiled anew for each adapter, and leaves merging alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from iteris_sd import backbone as backbones
from iteris_sd import compiling, merger, rendering
from iteris_sd.backbone import Backbone
from iteris_sd.calibration import finish
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA
from iteris_sd.rendering import Look, Settings
from tests import toybook
from tests.test_gpu import asked
from tests.toys import worst

SETTINGS = Settings("ddim", 3)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many operations each graph has that was compiled; they run as they are."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        found.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.setenv("ITERIS_SD_COMPILE", "on")
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def looks(backbone: Backbone) -> list[Look]:
    """The base model, two ranks on every layer, and one on half of them."""
    loras = [toybook.random_lora(backbone.pipeline, r, torch.Generator().manual_seed(r)) for r in (2, 5, 2)]
    half = LoRA({name: adapter for name, adapter in loras[2].items() if "attn2" in name})
    return [Look("a dog", lora) for lora in (None, *loras[:2], half)]


def drawn(backbone: Backbone, look: Look, seeds: list[int]) -> list[np.ndarray]:
    with backbone.prepared({}, look.lora):
        made = finish(rendering.render(backbone, look.prompt, "", seeds, SETTINGS))
    return [np.asarray(one.image, dtype=int) for one in made]


def test_it_draws_the_same_in_a_few_graphs(toy: Path, counted: list[int]) -> None:
    compiled = backbones.load("storybook")
    assert compiled._compiled is not None
    found = [drawn(compiled, look, [1]) for look in looks(compiled)]
    graphs = len(counted)
    assert graphs > 0
    for seed in range(5):  # other adapters of the same shapes
        other = toybook.random_lora(compiled.pipeline, 3, torch.Generator().manual_seed(100 + seed))
        drawn(compiled, Look("a dog", other), [1])
    assert len(counted) == graphs
    plain = Backbone(compiled.base, compiled.pipeline)
    plain._compiled = None
    for look, pictures in zip(looks(plain), found, strict=True):
        assert np.abs(drawn(plain, look, [1])[0] - pictures[0]).max() <= 1
    assert np.abs(found[0][0] - found[1][0]).max() > 5


def test_columns_at_once_are_those_apart(toy: Path, counted: list[int]) -> None:
    compiled = backbones.load("storybook")
    some = looks(compiled)[::2]
    several = finish(rendering.render_columns(compiled, some, "", [1, 2], SETTINGS))
    for look, made in zip(some, several, strict=True):
        for one, want in zip(made, drawn(compiled, look, [1, 2]), strict=True):
            assert np.abs(np.asarray(one.image, dtype=int) - want).max() <= 1


def test_merging_does_not_see_it(toy: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]) -> None:
    (found,) = finish(merger.merge_all(asked("iteris"), Library.shipped()))[1].values()
    merger.forget()
    backbones.forget()
    monkeypatch.delenv("ITERIS_SD_COMPILE")
    (wanted,) = finish(merger.merge_all(asked("iteris"), Library.shipped()))[1].values()
    assert worst(found.lora, wanted.lora) < 1e-3


def test_an_error_empties_the_slots(toy: Path, counted: list[int]) -> None:
    compiled = backbones.load("storybook")
    look = looks(compiled)[1]
    before = drawn(compiled, Look("a dog", None), [1])[0]
    with pytest.raises(ZeroDivisionError), compiled.prepared({}, look.lora):
        raise ZeroDivisionError
    assert np.array_equal(drawn(compiled, Look("a dog", None), [1])[0], before)


def test_what_is_asked_for_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ITERIS_SD_COMPILE", raising=False)
    assert not compiling.wanted()
    monkeypatch.setenv("ITERIS_SD_COMPILE", "perhaps")
    with pytest.raises(UserError, match="ITERIS_SD_COMPILE is 'perhaps'; choose on or off"):
        compiling.wanted()
