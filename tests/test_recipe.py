"""The recipe: what a person may ask for, and one sentence for everything else."""

import json
from pathlib import Path
from typing import Any

import pytest

from iteris_sd import bases, limits
from iteris_sd.errors import UserError
from iteris_sd.merging import METHODS
from iteris_sd.recipe import Recipe, fill

PAIR = {"concepts": [{"name": "dog"}, {"name": "barn"}], "prompt": "a {0} next to a {1}"}


def asked(**changes: Any) -> Recipe:
    return Recipe.of({**PAIR, **changes})


def test_defaults() -> None:
    recipe = asked()
    assert [use.name for use in recipe.methods] == ["base", "linear", "iteris"]
    assert recipe.seeds == (0, 1, 2, 3)
    assert [use.weight for use in recipe.concepts] == [1.0, 1.0]
    assert recipe.calibration.samples == 50


def test_json_brings_back_the_same_recipe(tmp_path: Path) -> None:
    recipe = asked(
        methods=[{"name": "iteris", "parameters": {"alpha": 1e-5, "coefficients": [1, 2]}}, {"name": "base"}],
        seeds=[7, limits.MAX_SEED],
        negative="rain · снег",
        concepts=[{"name": "dog", "weight": 0.5}, {"name": "barn"}],
        calibration={"samples": 3},
    )
    path = tmp_path / "recipe.json"
    path.write_text(recipe.json_text(), encoding="utf-8")
    assert Recipe.read(path) == recipe


def test_places_are_filled_in_any_order() -> None:
    assert fill("a {1} and a {0}, {1}", ["<rex> dog", "barn"]) == "a barn and a <rex> dog, barn"
    assert fill("no {braces} {0}", ["dog"]) == "no {braces} dog"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": " \n"}, "The prompt is empty; say what the picture should show."),
        ({"prompt": "x" * 1001}, "The prompt has 1001 characters; at most 1000 are allowed."),
        (
            {"prompt": "a {0} and a {2}"},
            "The prompt speaks of {2}, but only 2 concepts are picked: {0} to {1}.",
        ),
        ({"concepts": []}, "Choose between 1 and 6 concepts, not 0."),
        ({"concepts": [{"name": str(k)} for k in range(7)]}, "Choose between 1 and 6 concepts, not 7."),
        ({"concepts": [{"name": "dog"}] * 2}, "The concept dog is given twice; give each concept once."),
        ({"seeds": []}, "Choose between 1 and 16 seeds, not 0."),
        ({"seeds": list(range(17))}, "Choose between 1 and 16 seeds, not 17."),
        ({"seeds": [3, 3]}, "The seed 3 is given twice; give each seed once."),
        ({"methods": []}, "Choose between 1 and 8 methods, not 0."),
        (
            {"methods": [{"name": "ties?"}]},
            f"There is no method 'ties?'; choose from base, alone, {', '.join(METHODS)}.",
        ),
        (
            {"methods": [{"name": "base", "parameters": {"a": 1}}]},
            "The reference column base has no parameters.",
        ),
        (
            {"methods": [{"name": "iteris", "parameters": {"alpha": -1}}]},
            "alpha must lie between 0 and 1, not -1.",
        ),
        (
            {"methods": [{"name": "iteris", "parameters": {"coefficients": [1, 2, 3]}}]},
            "coefficients needs one number per concept, 2, not 3.",
        ),
        (
            {"methods": [{"name": "linear", "parameters": {"beta": 1}}]},
            "Linear has no parameter 'beta'; its parameters: none.",
        ),
        (
            {"base": "sdxl"},
            f"There is no base model 'sdxl'; choose one of {', '.join([*bases.BASES, *bases.ALLOWED])}.",
        ),
        ({"steps": 101}, "In the recipe, steps: input should be less than or equal to 100, not 101."),
        ({"guidance": float("nan")}, "In the recipe, guidance: input should be a finite number, not nan."),
        ({"seeds": [-1]}, "In the recipe, seeds 0: input should be greater than or equal to 0, not -1."),
        (
            {"sampler": "euler"},
            "In the recipe, sampler: input should be 'ddim', 'dpm++', 'ddpm', 'euler a', 'unipc' or 'lcm', "
            "not 'euler'.",
        ),
        ({"surprise": 1}, "In the recipe, surprise: extra inputs are not permitted, not 1."),
    ],
)
def test_what_cannot_be_done_is_told_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as told:
        asked(**changes)
    assert str(told.value) == sentence


def test_no_more_pictures_than_allowed() -> None:
    methods = [{"name": name} for name in ("base", "linear", "regmean", "iteris")]
    assert len(asked(methods=methods, seeds=list(range(16))).seeds) == 16


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no recipe: it is not valid JSON."),
        ("[1]", "is no recipe: a JSON object is expected, found list."),
        (" " * (limits.MAX_RECIPE_BYTES + 1), "is too large to be a recipe"),
        (json.dumps({"prompt": "a dog"}), "In the recipe, concepts: field required."),
        (None, "cannot be read: No such file or directory."),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as told:
        Recipe.read(path)
    assert sentence in str(told.value)
