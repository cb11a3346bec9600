"""Guesses of triggers and class nouns: the sources in their order, and whatever strangers write into metadata."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from iteris_sd import limits
from iteris_sd.guessing import Guess, guess

PHRASE, PROMPT = "modelspec.trigger_phrase", "instance_prompt"
TAGS, FOLDERS = "ss_tag_frequency", "ss_dataset_dirs"
LONG = "x" * (limits.MAX_NAME_CHARS + 1)


def tags(**folders: dict[str, Any]) -> str:
    return json.dumps(folders)


def found(metadata: dict[str, Any], tokens: tuple[str, ...] = (), stem: str = "my_file") -> tuple[str, str]:
    """Trigger and class noun."""
    told = guess(metadata, tokens, stem)
    return told.trigger, told.class_noun


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("sks dog", ("sks dog", "dog")),
        ("ohwx golden retriever, masterpiece", ("ohwx golden retriever", "golden retriever")),
        ("<rex> dog", ("<rex> dog", "dog")),
        ("<s0><s1> dog", ("<s0><s1> dog", "dog")),
        ("a photo of sks dog", ("sks dog", "dog")),
        ("The close portrait of the sks\x07  \tman", ("sks man", "man")),
        ("The Rock", ("The Rock", "Rock")),
        ("miku", ("miku", "my file")),
        ("<rex>", ("<rex>", "my file")),
    ],
)
def test_a_trigger_phrase_is_a_made_up_word_and_a_class(phrase: str, expected: tuple[str, str]) -> None:
    assert found({PHRASE: phrase}) == expected


@pytest.mark.parametrize(
    ("prompt", "tokens", "expected"),
    [
        ("a photo of sks dog", (), ("sks dog", "dog")),
        ("A painting of an sks teddy bear", (), ("sks teddy bear", "teddy bear")),
        ("a sks dog", (), ("sks dog", "dog")),
        ("a photo of <rex> dog", ("<rex>",), ("<rex> dog", "dog")),
        ("a photo of TOK dog", ("<s1>", "<s0>"), ("<s0><s1> dog", "dog")),
    ],
)
def test_the_prompt_of_training(prompt: str, tokens: tuple[str, ...], expected: tuple[str, str]) -> None:
    assert found({PROMPT: prompt}, tokens) == expected


@pytest.mark.parametrize(
    ("metadata", "tokens", "expected"),
    [
        ({}, ("<rex>",), ("<rex>", "my file")),
        ({}, ("<s10>", "<s1>", "<s0>"), ("<s0><s1><s10>", "my file")),
        ({}, ("rex", "fur"), ("fur rex", "my file")),
        ({TAGS: tags(**{"10_sks dog": {}})}, ("<rex>",), ("<rex> dog", "dog")),
        ({TAGS: tags(**{"1_sks " + "d" * 60: {}})}, ("<rex>",), ("<rex>", "d" * 60)),
        ({TAGS: tags(img={"long hair": 9})}, ("<rex>",), ("<rex>", "my file")),
        ({}, (f"<{LONG}>",), ("my file", "my file")),
    ],
)
def test_learned_tokens(metadata: dict[str, str], tokens: tuple[str, ...], expected: tuple[str, str]) -> None:
    assert found(metadata, tokens) == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({TAGS: tags(**{"10_sks dog": {"sks dog": 5}})}, ("sks dog", "dog")),
        ({TAGS: tags(**{"1_dog": {"dog": 200}, "20_sks old dog": {"grass": 5}})}, ("sks old dog", "old dog")),
        ({TAGS: tags(**{"2_old dog": {"dog": 200}, "10_sks dog": {"grass": 5}})}, ("sks dog", "dog")),
        ({TAGS: tags(img={"grass": 3, "sks dog": 5}, more={"grass": 1})}, ("sks dog", "dog")),
        ({TAGS: tags(img={"grass": 3, "sky": 4}, more={"grass": 2})}, ("grass", "my file")),
        ({TAGS: tags(img={LONG: 9, "": 8, "sks dog": 5, "odd": "7", "half": 6.5})}, ("sks dog", "dog")),
        ({FOLDERS: tags(**{"10_sks dog": {"n_repeats": 10}})}, ("sks dog", "dog")),
        ({TAGS: tags(**{"5_ohwx": {"1girl": 30, "smile": 9}})}, ("ohwx", "my file")),
        (
            {TAGS: tags(**{"5_ohwx": {"1girl": 30}}), FOLDERS: tags(**{"5_ohwx": {"n_repeats": 5}})},
            ("ohwx", "my file"),
        ),
        ({TAGS: tags(**{"5_ohwx": {"1girl": 30}, "1_woman": {"woman": 20}})}, ("1girl", "my file")),
        ({TAGS: tags(**{f"10_sks {LONG}": {}})}, ("my file", "my file")),
        ({TAGS: tags(**{f"{'9' * 5000}_sks dog": {}})}, ("my file", "my file")),
    ],
)
def test_folders_and_tags_of_kohya(metadata: dict[str, str], expected: tuple[str, str]) -> None:
    assert found(metadata) == expected


@pytest.mark.parametrize(
    ("stem", "words"),
    [("red_barn-v2", "red barn v2"), ("", "subject"), ("_-_", "subject"), ("b" * 99, "b" * 64)],
)
def test_at_last_the_name(stem: str, words: str) -> None:
    assert guess({}, (), stem) == Guess(words, words, "the file's name")


def test_sources_come_in_order_and_are_told() -> None:
    metadata = {
        PHRASE: "one cat",
        PROMPT: "a photo of two <t> cat",
        TAGS: tags(**{"9_four cat": {"five cat": 1}}),
    }
    expected = [
        ("one cat", "its trigger phrase (modelspec.trigger_phrase)"),
        ("two <t> cat", "the prompt it was trained with (instance_prompt)"),
        ("<t> cat", "its learned tokens"),
        ("four cat", "the training folders (ss_tag_frequency)"),
        ("five cat", "the most frequent tag (ss_tag_frequency)"),
        ("six", "the file's name"),
    ]
    seen = []
    for k in range(6):
        told = guess(metadata, ["<t>"] if k < 3 else [], "six")
        seen.append((told.trigger, told.source))
        if k in (0, 1):
            del metadata[[PHRASE, PROMPT][k]]
        elif k == 3:
            metadata[TAGS] = tags(img={"five cat": 1})
        elif k == 4:
            metadata[TAGS] = "{}"
    assert seen == expected


def test_the_noun_may_come_from_another_source() -> None:
    assert found({PHRASE: "rex", PROMPT: "a photo of sks dog"}) == ("rex", "dog")
    assert found({PHRASE: "rex", FOLDERS: tags(**{"5_sks cat": {}})}) == ("rex", "cat")


def subset(words: object, repeats: object = 1, is_reg: bool = False) -> dict[str, Any]:
    return {"image_dir": "img", "class_tokens": words, "num_repeats": repeats, "is_reg": is_reg}


@pytest.mark.parametrize(
    ("subsets", "expected"),
    [
        ([subset("sks dog")], ("sks dog", "dog")),
        ([subset("sks")], ("sks", "my file")),
        ([subset("dog", 20, is_reg=True), subset("sks dog", 2)], ("sks dog", "dog")),
        ([subset("old cat", 2), subset("sks dog", 10), subset("red fox", "99")], ("sks dog", "dog")),
        ([subset(None), 7, subset("None")], ("looking at viewer", "my file")),
        ([], ("looking at viewer", "my file")),
    ],
)
def test_settings_of_kohya_come_before_tags(subsets: list[Any], expected: tuple[str, str]) -> None:
    metadata = {
        "ss_datasets": json.dumps([{"is_dreambooth": True, "subsets": subsets}, "odd"]),
        TAGS: tags(img={"looking at viewer": 9}),
        PHRASE: "None",
    }
    assert found(metadata) == expected


KEYS = st.sampled_from([PHRASE, PROMPT, TAGS, FOLDERS, "ss_datasets", "other"])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
VALUES = st.text() | ANY_JSON.map(json.dumps) | st.integers() | st.none() | st.binary()


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, VALUES), st.lists(st.text(max_size=20), max_size=4), st.text(max_size=80))
@example({TAGS: "[" * 100_000}, [], "x")
@example({TAGS: '{"a": {"b": 1e999, "c": ' + "9" * 5000 + "}}"}, [], "x")
@example({TAGS: '{"img": {"\\ud800": 1}}', PHRASE: "\ud800 \x1b[31m"}, ["\ud800"], "\udfff")
@example(
    {key: "photo of " * 300_000 for key in (PHRASE, PROMPT, TAGS, FOLDERS)}, ["t" * 1_000_000], "s" * 10_000
)
@example({TAGS: json.dumps({"img": {f"tag {n}": n for n in range(20_000)}})}, [], "x")
def test_whatever_strangers_write_is_two_short_plain_phrases(
    metadata: dict[str, Any], tokens: list[str], stem: str
) -> None:
    told = guess(metadata, tokens, stem)
    for words in (told.trigger, told.class_noun):
        assert 1 <= len(words) <= limits.MAX_NAME_CHARS
        assert words == " ".join(words.split())
        assert "\x1b" not in words and "\x00" not in words
        words.encode()
    assert told.source
