"""Concepts and the library: found by name, read from disk when needed, refused in a sentence."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from iteris_sd import adding, bases, columns, concepts, limits
from iteris_sd.calibration import finish
from iteris_sd.concepts import Concept, Library, Loaded, check_together
from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA
from iteris_sd.recipe import Recipe
from tests import toybook


@pytest.fixture
def library(toy: Path) -> Library:
    return Library.shipped()


def copied(toy: Path, folder: Path) -> Path:
    """A concept folder of one's own."""
    return Path(shutil.copytree(toy / "concepts" / "dog", folder))


def test_the_library_lists_without_loading(library: Library) -> None:
    assert list(library.concepts) == ["barn", "cat", "dog"]
    assert library.find("dog").described() == {
        "name": "dog",
        "title": "Our dog",
        "trigger": "<rex> dog",
        "class_noun": "dog",
        "base": "storybook",
        "description": "",
        "licence": "",
        "weight": 1.0,
        "source": "",
        "references": 2,
    }
    assert [concept.name for concept in library.of_base("storybook")] == ["barn", "cat", "dog"]
    assert library.of_base("another") == []


def test_a_concept_loads_lora_tokens_and_pictures(library: Library) -> None:
    loaded = library.find("dog").load()
    assert len(loaded.lora) == 40 and {a.rank for a in loaded.lora.values()} == {2}
    assert {token: tuple(v.shape) for token, v in loaded.tokens.items()} == {"<rex>": (1, toybook.WIDTH)}
    assert [picture.size for picture in library.find("dog").pictures()] == [(16, 16)] * 2


def test_unknown_names_are_told_what_there_is(library: Library) -> None:
    with pytest.raises(UserError, match="There is no concept 'wolf'; choose from barn, cat, dog."):
        library.find("wolf")
    with pytest.raises(UserError, match="choose from none"):
        Library({}).find("wolf")


def test_paths_are_only_opened_on_request(library: Library, toy: Path, tmp_path: Path) -> None:
    folder = str(copied(toy, tmp_path / "mine"))
    file = str(tmp_path / "mine" / "lora.safetensors")
    with pytest.raises(UserError, match="There is no concept"):
        library.find(folder)
    opened = finish(adding.opening(library, ["cat", folder, file]))
    assert opened.find(folder).title == "Our dog"
    assert opened.find(file).lora == Path(file)
    assert len(opened.concepts) == 5
    with pytest.raises(UserError, match="There is no concept and no file"):
        finish(adding.opening(library, [str(tmp_path / "none.safetensors")]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no concept: concept.json cannot be read"),
        ("{", "is no description"),
        ("[1]", "is no description"),
        ('{"name": "x"}', "tell its 'title'"),
    ],
)
def test_a_broken_folder_is_told(toy: Path, tmp_path: Path, content: str | None, message: str) -> None:
    folder = copied(toy, tmp_path / "mine")
    (folder / "concept.json").unlink()
    if content is not None:
        (folder / "concept.json").write_text(content)
    with pytest.raises(UserError, match=message):
        concepts.read_concept(folder)


def test_words_in_the_folder_must_be_words(toy: Path, tmp_path: Path) -> None:
    folder = copied(toy, tmp_path / "mine")
    told = json.loads((folder / "concept.json").read_text())
    for wrong in (7, "", "x" * 65):
        (folder / "concept.json").write_text(json.dumps({**told, "trigger": wrong}))
        with pytest.raises(UserError, match="trigger"):
            concepts.read_concept(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"weight": 0}, "The weight of a concept must be a number above 0 and at most 4, not 0"),
        ({"weight": 4.01}, "at most 4, not 4.01"),
        ({"weight": float("nan")}, "at most 4, not nan"),
        ({"weight": "1"}, "at most 4, not '1'"),
        ({"weight": True}, "at most 4, not True"),
        ({"source": 7}, "The source of a concept must be a text, not 7"),
        ({"description": "x" * 1001}, "The description has 1001 characters; at most 1000 are allowed"),
        ({"base": ["sd15"]}, "The base model of a concept must be a word"),
        ({"filler": "x" * limits.MAX_CONCEPT_BYTES}, "it has more than 262,144 bytes"),
    ],
)
def test_what_the_folder_says_is_checked(
    toy: Path, tmp_path: Path, words: dict[str, Any], message: str
) -> None:
    folder = copied(toy, tmp_path / "mine")
    told = json.loads((folder / "concept.json").read_text())
    (folder / "concept.json").write_text(json.dumps({**told, **words}))
    with pytest.raises(UserError, match=message):
        concepts.read_concept(folder)


def test_what_the_folder_says_is_read(toy: Path, tmp_path: Path) -> None:
    folder = copied(toy, tmp_path / "mine")
    told = json.loads((folder / "concept.json").read_text())
    more = {"title": " Our\n dog\x1b \ud800", "weight": 2, "source": "some/dog", "revision": "abc"}
    (folder / "concept.json").write_text(json.dumps({**told, **more}))
    for name in ("c.JPG", "d.jpeg", "e.webp", "f.txt"):
        (folder / "references" / name).touch()
    (folder / "lora").mkdir()
    read = concepts.read_concept(folder)
    assert (read.title, read.weight, read.source, read.revision) == ("Our dog", 2.0, "some/dog", "abc")
    assert [path.name for path in read.references] == ["0.png", "1.png", "c.JPG", "d.jpeg", "e.webp"]
    assert read.lora == folder / "lora.safetensors"
    read.lora.unlink()
    assert concepts.read_concept(folder).lora == folder / "lora"


def test_of_two_libraries_the_first_one_s_names_win(library: Library) -> None:
    dog = replace(library.find("dog"), title="Mine")
    joined = Library({"rex": dog, "dog": dog}).joined(library)
    assert list(joined.concepts) == ["rex", "dog", "barn", "cat"] and joined.find("dog").title == "Mine"


def test_a_broken_picture_is_told(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "big.png")
    dog = library.find("dog")
    with pytest.raises(UserError, match="bad.png is no picture that can be opened"):
        replace(dog, references=(tmp_path / "bad.png",)).pictures()
    monkeypatch.setattr(limits, "MAX_PICTURE_PIXELS", 80)
    with pytest.raises(UserError, match="big.png has more than 80 pixels"):
        replace(dog, references=(tmp_path / "big.png",)).pictures()


def test_what_cannot_be_used_together(library: Library) -> None:
    dog, barn = library.find("dog").load(), library.find("barn").load()
    check_together([dog, barn], "storybook")

    def other(loaded: Loaded, tokens: bool = False, **changes: Any) -> Loaded:
        return Loaded(replace(loaded.concept, **changes), loaded.lora, loaded.tokens if tokens else {})

    for second, message in (
        (other(dog, name="rex"), "dog and rex have the same trigger, '<rex> dog'"),
        (other(dog, name="rex", trigger="<REX> dog"), "have the same trigger"),
        (other(dog, tokens=True, name="rex", trigger="rex"), "dog and rex both bring the token '<rex>'"),
        (other(barn, name="dog"), "Two concepts are called 'dog'"),
        (other(barn, base="sdxl"), "barn was made for sdxl, not for storybook"),
    ):
        with pytest.raises(UserError, match=message):
            check_together([dog, second], "storybook")


def plain(prompt: str, *named: tuple[str, str, str]) -> str:
    """The prompt in plain words, for concepts given by trigger, class noun and token."""
    picked = [
        Loaded(
            Concept(str(k), "", trigger, noun, Path()), LoRA({}), {token: torch.zeros(1, 1)} if token else {}
        )
        for k, (trigger, noun, token) in enumerate(named)
    ]
    recipe = Recipe.of({"concepts": [{"name": str(k)} for k in range(len(named))], "prompt": prompt})
    return columns.prompt_in_plain_words(recipe, picked)


REX, BARN = ("<rex> dog", "dog", "<rex>"), ("<lucky> barn", "barn", "<lucky>")


@pytest.mark.parametrize(
    ("prompt", "named", "expected"),
    [
        ("a {0} by a {1}", [REX, BARN], "a dog by a barn"),
        ("a {1} by a <REX> Dog", [REX, BARN], "a barn by a dog"),
        ("a picture of <rex>", [REX], "a picture of dog"),
        ("a {0} and a {1}", [("rex", "dog", ""), ("dog", "animal", "")], "a dog and a animal"),
        ("a cat in a catalogue", [("cat", "kitten", "")], "a kitten in a catalogue"),
        ("a {0}", [("rex", r"\1 dog", "")], r"a \1 dog"),
    ],
)
def test_plain_words(prompt: str, named: list[tuple[str, str, str]], expected: str) -> None:
    assert plain(prompt, *named) == expected


def test_shipped_concepts_are_whole() -> None:
    library = Library.shipped()
    if not library.concepts:
        pytest.skip(f"no concepts in {bases.ASSETS / 'concepts'} yet")
    for concept in library.concepts.values():
        loaded = concept.load()
        assert loaded.tokens and len(loaded.lora) > 0
        assert all(token in concept.trigger for token in loaded.tokens)
        assert concept.trigger.endswith(concept.class_noun)
        assert len(concept.pictures()) >= 3 and concept.licence
