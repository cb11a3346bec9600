"""Recipes out of links, pictures and files: the same recipe comes back, and strangers' text does no harm."""

import base64
import io
import json
import string
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from iteris_sd import bases, export, limits, restoring
from iteris_sd.errors import UserError
from iteris_sd.events import Picture
from iteris_sd.merging import registry
from iteris_sd.recipe import REFERENCES, Recipe
from iteris_sd.scoring import Score

PAIR: dict[str, Any] = {"concepts": [{"name": "dog"}, {"name": "barn"}], "prompt": "a {0} next to a {1}"}


def asked(**changes: Any) -> Recipe:
    return Recipe.of({**PAIR, **changes})


def link(content: bytes, letter: str = "a") -> str:
    """A link's text around any content."""
    return letter + base64.urlsafe_b64encode(zlib.compress(content)).decode().rstrip("=")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def dials(parameter: registry.Parameter, concepts: int) -> st.SearchStrategy[Any]:
    """Values that one parameter of a method may have."""
    if parameter.type == "choice":
        return st.sampled_from(parameter.choices)
    low, high = max(parameter.low, -1e6), min(parameter.high, 1e6)
    if parameter.type == "int":
        return st.integers(int(low), int(high))
    numbers = st.floats(low, high)
    return numbers if parameter.type == "float" else st.lists(numbers, min_size=concepts, max_size=concepts)


@st.composite
def method_uses(draw: st.DrawFn, concepts: int) -> dict[str, Any]:
    name = draw(st.sampled_from([*REFERENCES, *registry.METHODS]))
    found = () if name in REFERENCES else registry.find(name).parameters
    values = {parameter.name: dials(parameter, concepts) for parameter in found}
    return {"name": name, "parameters": draw(st.fixed_dictionaries({}, optional=values))}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Valid recipes, with any of their fields left out."""
    names = draw(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=4, unique=True))
    weights = st.floats(0, limits.MAX_WEIGHT, exclude_min=True)
    words = st.text(st.characters(codec="utf-8", exclude_characters="()[]{}"), max_size=60)
    parts = st.fixed_dictionaries({"up": weights}, optional={"down": st.floats(0, limits.MAX_WEIGHT)})
    own = {"weight": weights, "blocks": parts}
    used = [draw(st.fixed_dictionaries({"name": st.just(n)}, optional=own)) for n in names]
    most = draw(st.integers(1, limits.MAX_SAMPLES))
    calibration = {"samples": st.just(most), "seed": st.integers(0, limits.MAX_SEED)}
    fields: dict[str, st.SearchStrategy[Any]] = {
        "base": st.sampled_from([*bases.BASES, *bases.ALLOWED]),
        "negative": words,
        "methods": st.lists(method_uses(len(names)), min_size=1, max_size=3, unique_by=lambda m: m["name"]),
        "seeds": st.lists(st.integers(0, limits.MAX_SEED), min_size=1, max_size=8, unique=True),
        "steps": st.integers(1, limits.MAX_STEPS),
        "guidance": st.floats(1, limits.MAX_GUIDANCE),
        "size": st.none() | st.sampled_from(range(limits.MIN_SIZE, limits.MAX_SIZE + 1, 64)),
        "clip_skip": st.integers(1, limits.MAX_CLIP_SKIP),
        "scorer": st.sampled_from(["", "none"]),
        "strength": st.floats(0, limits.MAX_STRENGTH),
        "retention": st.integers(0, 1),
        "calibration": st.fixed_dictionaries(calibration, optional={"unconditional": st.integers(0, most)}),
    }
    prompt = words.map(lambda text: f"{text} {{0}}")
    said: dict[str, Any] = draw(st.fixed_dictionaries({"prompt": prompt}, optional=fields))
    try:
        return Recipe.of({**said, "concepts": used})
    except UserError as error:
        # The only rule that these values may break: numbers that must not all be zero.
        assert "must not all be zero" in str(error), error
        return Recipe.of({**said, "methods": [{"name": "base"}], "concepts": used})


# Links


@given(recipes())
@settings(deadline=None, max_examples=150)
def test_a_link_brings_back_the_same_recipe(recipe: Recipe) -> None:
    text = restoring.to_query(recipe)
    assert set(text) <= set(f"{string.ascii_letters}{string.digits}-_") and text[0] == "a"
    there = restoring.from_query(text)
    assert there == recipe and there.json_text() == recipe.json_text()


def test_a_usual_link_is_short() -> None:
    assert len(restoring.to_query(asked())) < 120


def test_every_field_that_is_no_default_travels() -> None:
    changes = {"steps": 3, "seeds": [9], "methods": [{"name": "iteris", "parameters": {"alpha": 1e-5}}]}
    there = restoring.from_query(restoring.to_query(asked(**changes)))
    assert there == asked(**changes) != asked()


def test_links_made_before_mean_the_same_still() -> None:
    """If this fails, a default has changed: links need another letter, and this one its old defaults."""
    old = (
        "aeNqrVkrOz0tOLSgpVrKKrlbKS8xNVbJSSslPV6rVgXOTEovylGpjdZQKivJzC0qAIokK1Qa1CnmpFSUKJfkKQJ5hrVItANhhGTI"
    )
    methods = [{"name": "base"}, {"name": "linear"}, {"name": "iteris"}]
    calibration = {"samples": 50, "steps": 10, "seed": 0, "unconditional": 0, "tokens_per_sample": None}
    drawn = {"sampler": "ddim", "steps": 20, "guidance": 4.0, "size": None, "clip_skip": 1, "scorer": ""}
    meant = {"base": "storybook", "negative": "", "methods": methods, "seeds": [0, 1, 2, 3], **drawn}
    assert restoring.from_query(old) == asked(**meant, calibration=calibration)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "The link holds no recipe; copy it again"),
        ("a", "The link's recipe is not whole"),
        ("a b", "The link holds no recipe"),
        ("a\n", "The link holds no recipe"),
        ("aä", "The link holds no recipe"),
        ("a\ud800", "The link holds no recipe"),
        ("aeN", "The link's recipe is not whole"),
        ("aeNqrV", "The link's recipe is (damaged|not whole)"),
        ("aAAAA", "The link's recipe is damaged"),
        ("aA", "The link's recipe is damaged"),
        ("b" + restoring.to_query(asked())[1:], "begins with 'b', where 'a' is expected"),
        (restoring.to_query(asked())[:-4], "The link's recipe is not whole"),
        ("a" * (limits.MAX_QUERY_CHARS + 1), "The link has 16385 characters; one with a recipe has at most"),
        (link(b""), "The link carries a broken recipe: it is not valid JSON"),
        (link(b"\xff\xfe\xfd"), "not valid JSON"),
        (link(b"[1]"), "The link carries no recipe: a JSON object is expected, found list"),
        (link(nested(100_000).encode()), "not valid JSON"),
        (link(b'{"prompt": "a dog"}'), "In the recipe, concepts: field required"),
    ],
)
def test_a_link_that_holds_no_recipe(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        restoring.from_query(text)


def test_what_follows_a_recipe_is_refused() -> None:
    packed = zlib.compress(json.dumps(PAIR).encode()) + b"more"
    with pytest.raises(UserError, match="is not whole"):
        restoring.from_query("a" + base64.urlsafe_b64encode(packed).decode().rstrip("="))


def test_a_bomb_is_not_unpacked() -> None:
    bomb = link(b" " * 8_000_000)
    assert len(bomb) < limits.MAX_QUERY_CHARS
    with pytest.raises(UserError, match=f"unpacks to more than a recipe's {limits.MAX_RECIPE_BYTES} bytes"):
        restoring.from_query(bomb)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base": "sdxl"}, "There is no base model 'sdxl'; choose one of"),
        ({"base": "x" * 9999}, "There is no base model 'x{270,}…$"),
        ({"version": 2}, "The recipe is of version 2, and this program knows 1; update it"),
        ({"version": 10**4000}, "The recipe is of version 100000000"),
        ({"upscale": 2}, "The recipe speaks of 'upscale', which is not known here"),
        ({"": 2}, "The recipe speaks of '', which is not known here"),
        ({"seeds": [10**4000]}, "In the recipe, seeds 0: input should be less"),
        ({"prompt": "a \ud800"}, "The recipe holds a broken character"),
        ({"concepts": 3}, "In the recipe, concepts: input should be a valid tuple"),
    ],
)
def test_a_recipe_that_does_not_hold_here(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        restoring.from_query(link(json.dumps({**PAIR, **changes}).encode()))


@pytest.mark.parametrize("value", ["1" + "0" * 400, nested(900), "NaN", "1e999", '{"a": {}}', '"\\ud800"'])
def test_a_parameter_that_no_method_has_thought_of(value: str) -> None:
    methods = f'[{{"name": "iteris", "parameters": {{"alpha": {value}}}}}]'
    text = json.dumps(PAIR)[:-1] + f', "methods": {methods}}}'
    with pytest.raises(UserError):
        restoring.from_query(link(text.encode()))


def test_a_recipe_too_long_for_a_link_is_told() -> None:
    letters = "".join(chr(0x4E00 + (k * k * 7919 + k) % 20_000) for k in range(30_000))
    with pytest.raises(UserError, match="and a link holds 16384; hand it on as a file"):
        restoring.to_query(asked(concepts=[{"name": letters}, {"name": "barn"}]))


def test_the_longest_prompts_fit_into_a_link() -> None:
    rare = "".join(chr(0x1F000 + (k * k * 7919 + k) % 3000) for k in range(limits.MAX_PROMPT_CHARS))
    recipe = asked(prompt=rare, negative=rare[::-1])
    assert restoring.from_query(restoring.to_query(recipe)) == recipe


def only_user_errors(read: Callable[[], object]) -> None:
    try:
        assert isinstance(read(), Recipe)
    except UserError as error:
        assert 0 < len(str(error)) <= 2 * limits.MAX_TOLD_CHARS
        str(error).encode()


@given(st.text() | st.binary().map(lambda content: "a" + base64.urlsafe_b64encode(content).decode()))
@settings(deadline=None)
def test_forged_links_are_told(text: str) -> None:
    only_user_errors(lambda: restoring.from_query(text))


@given(st.binary().map(link))
@settings(deadline=None)
def test_forged_contents_are_told(text: str) -> None:
    only_user_errors(lambda: restoring.from_query(text))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)) | st.text(), ANYTHING, max_size=4))
@example({"methods": [{"name": "iteris", "parameters": {"coefficients": [10**400, 1]}}]})
@settings(deadline=None)
def test_forged_values_are_told(changes: dict[str, Any]) -> None:
    text = link(json.dumps({**PAIR, **changes}).encode())
    only_user_errors(lambda: restoring.from_query(text[: limits.MAX_QUERY_CHARS]))


@given(place=st.integers(0, 99), letter=st.sampled_from(f"{string.ascii_letters}{string.digits}-_"))
@settings(deadline=None)
def test_a_damaged_link_is_refused(place: int, letter: str) -> None:
    whole = restoring.to_query(asked())
    place %= len(whole)
    damaged = whole[:place] + letter + whole[place + 1 :]
    try:
        assert restoring.from_query(damaged) == asked()
    except UserError:
        assert damaged != whole


# Pictures and files


def drawn(recipe: Recipe) -> bytes:
    """A picture with the recipe inside, as the composer's are."""
    score = Score(text=None, text_cosine=None, images={}, minimum=None, mean=None)
    return export.picture_png(Picture("iteris", 3, Image.new("RGB", (24, 16)), "a dog", score), recipe)


def png(path: Path, entries: dict[str, str], compressed: bool = False) -> Path:
    told = PngInfo()
    for key, value in entries.items():
        told.add_text(key, value, zip=compressed)
    Image.new("RGB", (4, 4)).save(path, pnginfo=told)
    return path


@pytest.mark.parametrize("negative", ["rain", "снег · ☂"])
@pytest.mark.parametrize("read", [restoring.from_picture, restoring.from_file])
def test_a_picture_brings_back_its_recipe(
    tmp_path: Path, read: Callable[[Path], Recipe], negative: str
) -> None:
    recipe = asked(negative=negative, seeds=[7], concepts=[{"name": "dog", "weight": 0.3}, {"name": "barn"}])
    path = tmp_path / "called anything"
    path.write_bytes(drawn(recipe))
    assert read(path) == recipe


@given(recipe=recipes())
@settings(deadline=None, max_examples=30)
def test_every_recipe_travels_in_a_picture(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "picture.png"
    path.write_bytes(drawn(recipe))
    assert restoring.from_file(path) == recipe


def test_a_file_of_json_brings_back_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text("\n  " + asked(steps=9).json_text(), encoding="utf-8")
    assert restoring.from_file(path) == asked(steps=9)


def test_a_compressed_entry_is_read(tmp_path: Path) -> None:
    facts = json.dumps({"recipe": asked().model_dump(mode="json")})
    assert restoring.from_picture(png(tmp_path / "a.png", {"iteris_sd": facts}, compressed=True)) == asked()


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    whole = drawn(asked())
    path.write_bytes(whole[: whole.index(b"IDAT") + 6])
    assert restoring.from_picture(path) == asked()


def saved_again(path: Path) -> None:
    with Image.open(io.BytesIO(drawn(asked()))) as picture:
        picture.copy().save(path)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({}, "a.png carries no recipe; choose a single picture that was drawn here and not saved again"),
        ({"parameters": "a dog\nSteps: 20"}, "a.png carries A1111's parameters, but no recipe; choose"),
        ({"iteris_sd": "{"}, "a.png carries a broken recipe: it is not valid JSON"),
        ({"iteris_sd": nested(60_000)}, "a.png carries a broken recipe: it is not valid JSON"),
        ({"iteris_sd": "[]"}, "a.png carries no recipe: a JSON object is expected, found list"),
        ({"iteris_sd": '{"recipe": 3}'}, "a.png carries a broken recipe; choose another picture"),
        ({"iteris_sd": '{"recipe": {"prompt": "x"}}'}, "In the recipe, concepts: field required"),
        (
            {"iteris_sd": json.dumps({"recipe": {**PAIR, "version": 9}})},
            "The recipe is of version 9, and this program knows 1",
        ),
        ({"iteris_sd": " " * (limits.MAX_RECIPE_BYTES + 1)}, "a.png is too large to hold a recipe"),
    ],
)
def test_a_picture_without_a_recipe(tmp_path: Path, entries: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        restoring.from_picture(png(tmp_path / "a.png", entries))


def test_a_picture_that_another_program_saved_again_is_told(tmp_path: Path) -> None:
    saved_again(tmp_path / "again.png")
    with pytest.raises(UserError, match="again.png carries no recipe"):
        restoring.from_picture(tmp_path / "again.png")


def test_a_text_that_unpacks_to_a_lot_is_refused(tmp_path: Path) -> None:
    path = png(tmp_path / "bomb.png", {"iteris_sd": " " * 20_000_000}, compressed=True)
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match="bomb.png is a damaged PNG"):
        restoring.from_picture(path)


def test_files_that_are_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(photo, "JPEG")
    with pytest.raises(UserError, match="photo.png is no PNG; choose a picture as it was saved here"):
        restoring.from_picture(photo)
    with pytest.raises(UserError, match="photo.png is neither a PNG nor a recipe.json"):
        restoring.from_file(photo)
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match=f"There is no file {missing.name}"):
            restoring.from_file(missing)
    monkeypatch.setattr(limits, "MAX_DRAWN_BYTES", 100)
    with pytest.raises(UserError, match="photo.png has .* bytes; a drawn picture has at most 100"):
        restoring.from_file(photo)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "r.json is neither a PNG nor a recipe.json"),
        ("{", "r.json carries a broken recipe: it is not valid JSON"),
        ('{"prompt": ' + nested(100_000), "not valid JSON"),
        ("{" + " " * limits.MAX_RECIPE_BYTES, "r.json is too large to hold a recipe: 262,145 bytes"),
        ('{"prompt": "a dog"}', "In the recipe, concepts: field required"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        restoring.from_file(path)


@given(
    damage=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    ),
    cut=st.floats(0, 1),
)
@settings(deadline=None, max_examples=200)
def test_damaged_pictures_are_told(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[float, int]], cut: float
) -> None:
    content = bytearray(drawn(asked()))
    for place, value in damage:
        content[int(place * len(content))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(content[: int((1 - cut**4) * len(content))])
    only_user_errors(lambda: restoring.from_file(path))
