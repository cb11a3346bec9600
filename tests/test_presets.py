"""Presets: what ships is whole, prompts follow the order of picking, broken files are refused in one sentence."""

import subprocess
import sys

import pytest

from iteris_sd import presets
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe, places

PAPER_PAIRS = {
    frozenset(pair)
    for pair in (
        ("wooden-pot", "teddybear"),
        ("flower", "dog"),
        ("teddybear", "tortoise-plushy"),
        ("cat", "barn"),
        ("wooden-pot", "cat"),
        ("flower", "wooden-pot"),
        ("dog", "sunglasses"),
    )
}
BROKEN = {
    "no YAML": "title: [",
    "a list": "- a {0}",
    "a place too many": "{title: T, source: paper, concepts: [dog], prompts: ['a {0} and a {1}']}",
    "a concept left out": "{title: T, source: paper, concepts: [dog, cat], prompts: ['a {0}']}",
    "a prompt twice": "{title: T, source: paper, concepts: [dog], prompts: ['a {0}', 'a {0}']}",
    "no prompts": "{title: T, source: paper, concepts: [dog], prompts: []}",
    "an unknown key": "{title: T, source: paper, concepts: [dog], prompts: ['a {0}'], colour: red}",
}


def test_the_papers_seven_pairs_ship_with_eight_prompts_each():
    paper = [preset for preset in presets.presets().values() if preset.source == "paper"]
    assert {frozenset(preset.concepts) for preset in paper} == PAPER_PAIRS
    assert all(len(preset.prompts) == 8 for preset in presets.presets().values())


def test_there_are_triples():
    assert sum(len(p.concepts) == 3 and not p.general for p in presets.presets().values()) >= 3


def test_paper_settings_are_those_of_the_paper():
    paper = presets.settings()["paper"]
    assert (paper.sampler, paper.steps, paper.guidance, paper.samples) == ("ddpm", 100, 12.0, 50)
    assert "quick" in presets.settings()


@pytest.mark.parametrize("preset", presets.presets().values(), ids=lambda preset: preset.name)
def test_every_prompt_makes_a_recipe(preset):
    concepts = [{"name": f"{name}{k}"} for k, name in enumerate(preset.concepts)]
    for prompt in preset.prompts:
        Recipe.of({"concepts": concepts, "prompt": prompt})


def test_prompts_follow_the_order_of_picking():
    one, other = presets.prompts_for(["flower", "dog"]), presets.prompts_for(["dog", "flower"])
    assert one[0] == "a {1} next to a {0} on the beach"
    assert other[0] == "a {0} next to a {1} on the beach"


def test_concepts_without_a_preset_get_prompts_for_so_many():
    assert presets.prompts_for(["barn", "mine"]) == presets.presets()["any-two"].prompts
    assert all(set(places(prompt)) == {0, 1, 2} for prompt in presets.prompts_for(["barn", "mine", "cat"]))
    assert presets.prompts_for([]) == ()


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="mine.yaml"):
        presets.presets(tmp_path)


def test_reading_presets_needs_no_torch():
    code = "import sys, iteris_sd.presets as p; p.presets(), p.settings(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
