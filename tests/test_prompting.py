"""Prompts: weights as A1111 writes them, texts of any length, and plain prompts read exactly as before."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iteris_sd import limits, prompting, sd15
from iteris_sd.backbone import Backbone
from iteris_sd.errors import UserError
from iteris_sd.prompting import Piece, parse


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a dog", [("a dog", 1.0)]),
        ("", []),
        ("a (dog)", [("a ", 1.0), ("dog", 1.1)]),
        ("a ((dog))", [("a ", 1.0), ("dog", 1.21)]),
        ("a [dog]", [("a ", 1.0), ("dog", 1 / 1.1)]),
        ("a (dog:1.3) here", [("a ", 1.0), ("dog", 1.3), (" here", 1.0)]),
        ("(a (big:2) dog:0.5)", [("a ", 0.5), ("big", 1.0), (" dog", 0.5)]),
        (r"a \(dog\) \\ \[cat\]", [(r"a (dog) \ [cat]", 1.0)]),
        ("at 10:30", [("at 10:30", 1.0)]),
        ("smile :)", [("smile :)", 1.0)]),
        ("an open (bracket", [("an open (bracket", 1.0)]),
        ("an open (bracket (dog)", [("an open (bracket ", 1.0), ("dog", 1.1)]),
        ("[dog:1.3)", [("[dog:1.3)", 1.0)]),
        ("(dog: 1.3 )", [("dog", 1.3)]),
        ("a dog BREAK a barn", [("a dog", 1.0), (" ", 1.0), ("a barn", 1.0)]),
        ("BREAK", [(" ", 1.0)]),
        ("(a dog BREAK cat:2)", [("a dog", 2.0), (" ", 1.0), ("cat", 2.0)]),
        (r"a \BREAK, BREAKS, break", [("a BREAK, BREAKS, break", 1.0)]),
    ],
)
def test_weights_are_read(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = parse(prompt)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])


@given(st.text() | st.lists(st.sampled_from(["BREAK", "\\", "(", ")", " ", ":1)", "_", "a"])).map("".join))
def test_escaped_words_are_read_as_they_stand(words: str) -> None:
    assert prompting.plain(prompting.escaped(words)) == words
    assert parse(prompting.escaped(words)) == ([Piece(words)] if words else [])


@given(st.lists(st.sampled_from([*"ab ()[]:\\1.5-", "BREAK"])).map("".join))
def test_no_prompt_breaks_the_reader(prompt: str) -> None:
    try:
        pieces = parse(prompt)
    except UserError:
        return
    assert all(0 <= piece.weight <= limits.MAX_PROMPT_WEIGHT for piece in pieces)
    for a, b in pairwise(pieces):
        assert a.weight != b.weight or a.apart or b.apart


@pytest.mark.parametrize("prompt", ["(dog:5)", "(dog:-1)", "((((((((((((((((dog))))))))))))))))"])
def test_a_weight_out_of_bounds_is_told(prompt: str) -> None:
    with pytest.raises(UserError, match="'dog' has the weight .*; weights go from 0 to 4"):
        parse(prompt)


@pytest.mark.parametrize(
    "prompt", ["", "a photo of a dog next to a red barn, on the beach!", "naïve 10:30 café"]
)
def test_a_short_plain_prompt_has_the_tokenizers_own_ids(prompt: str) -> None:
    tokenizer = sd15.tokenizer()
    ids, weights = prompting.tokenised(tokenizer, [prompt])
    theirs = tokenizer([prompt], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids.shape == (1, 1, 77) and torch.equal(ids[:, 0], theirs)
    assert bool((weights == 1).all())


def test_a_long_prompt_goes_on_in_chunks_at_a_words_end() -> None:
    tokenizer = sd15.tokenizer()
    words = " ".join(["extraordinarily"] * 40 + ["skyscrapers"] * 20)
    ids, _ = prompting.tokenised(tokenizer, [words, "a dog"])
    assert ids.shape[0] == 2 and ids.shape[1] >= 2 and ids.shape[2] == 77
    assert bool((ids[:, :, 0] == tokenizer.bos_token_id).all())
    read = [[t for t in chunk if t < tokenizer.bos_token_id] for chunk in ids[0].tolist()]
    assert [t for chunk in read for t in chunk] == tokenizer(words, add_special_tokens=False).input_ids
    assert all(tokenizer.convert_ids_to_tokens(chunk[-1]).endswith("</w>") for chunk in read if chunk)
    assert torch.equal(ids[1, 1], prompting.tokenised(tokenizer, [""])[0][0, 0])  # filled up with nothing


def test_what_follows_a_break_is_read_apart() -> None:
    tokenizer = sd15.tokenizer()
    ids, _ = prompting.tokenised(tokenizer, ["a dog BREAK a (red barn:1.5)", "BREAK a cat", "BREAK BREAK"])
    one, red, none, cat = (
        prompting.tokenised(tokenizer, [t])[0][0, 0] for t in ("a dog", "a red barn", "", "a cat")
    )
    assert ids.shape == (3, 3, 77)
    for found, expected in zip(ids, ([one, red, none], [none, cat, none], [none, none, none]), strict=True):
        assert torch.equal(found, torch.stack(expected))


def test_many_breaks_are_told() -> None:
    assert sum(piece.apart for piece in parse("BREAK " * limits.MAX_BREAKS)) == limits.MAX_BREAKS
    with pytest.raises(UserError, match="has 9 BREAKs; at most 8 are allowed"):
        parse("BREAK " * 9)


def test_a_word_longer_than_a_chunk_is_cut() -> None:
    tokenizer = sd15.tokenizer()
    word = "1" * 200  # a token for each digit, and no word ends between them
    ids, _ = prompting.tokenised(tokenizer, ["a " + word])
    read = [t for chunk in ids[0].tolist() for t in chunk if t < tokenizer.bos_token_id]
    assert read == tokenizer("a " + word, add_special_tokens=False).input_ids


def test_weights_follow_their_words() -> None:
    tokenizer = sd15.tokenizer()
    ids, weights = prompting.tokenised(tokenizer, ["a (red dog:1.5) barn"])
    names = tokenizer.convert_ids_to_tokens(ids[0, 0, :5].tolist())
    assert names[1:] == ["a</w>", "red</w>", "dog</w>", "barn</w>"]
    assert weights[0, 0, :6].tolist() == [1.0, 1.0, 1.5, 1.5, 1.0, 1.0]


def test_weighing_keeps_the_mean_and_ones_change_nothing() -> None:
    states = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = torch.ones(2, 7)
    weights[1, 2:4] = 1.7
    found = prompting.weighed(states, weights)
    assert torch.equal(found[0], states[0])
    assert torch.allclose(found.mean(dim=(1, 2)), states.mean(dim=(1, 2)))
    ratio = found[1] / states[1]
    assert torch.allclose(ratio[2] / ratio[0], torch.full((5,), 1.7))


@pytest.mark.parametrize("mean", [0.0, 0.005, -0.005])
@pytest.mark.parametrize("weight", [0.5, 1.5, 4.0])
def test_states_without_a_mean_to_speak_of_keep_their_strength(mean: float, weight: float) -> None:
    """As Storybook's are; by the ratio of two means near nothing all words would grow or turn over."""
    states = torch.randn(8, 48, 64, generator=torch.Generator().manual_seed(0))
    states += mean - states.mean(dim=(1, 2), keepdim=True)
    weights = torch.ones(8, 48)
    weights[:, 2:5] = weight
    found = prompting.weighed(states, weights)
    assert torch.allclose(found.square().mean(dim=(1, 2)), states.square().mean(dim=(1, 2)))
    assert (
        0.5 < float((found[:, 10] / states[:, 10]).min()) <= float((found[:, 10] / states[:, 10]).max()) < 1.2
    )


def test_a_mean_that_turns_over_turns_no_word_over() -> None:
    states = torch.full((1, 4, 3), 1.0)
    states[:, 3] = -2.0  # the mean of all is 0.25, and with that word three times as strong -0.75
    found = prompting.weighed(states, torch.tensor([[1.0, 1.0, 1.0, 3.0]]))
    assert torch.equal(found.sign(), states.sign())


def test_a_weight_in_one_chunk_leaves_the_others_alone(backbone: Backbone) -> None:
    words = "a dog and a barn " * 40
    plain, weighed = (backbone.encode([prompt])[0] for prompt in (words, f"(a dog:2) {words[6:]}"))
    positions = backbone.tokenizer.model_max_length
    assert not torch.equal(plain[:positions], weighed[:positions])
    assert torch.equal(plain[positions:], weighed[positions:])


@pytest.mark.parametrize("token", ["<big>", "<Big>"])
@pytest.mark.parametrize("before", [0, 66, 67, 68, 74, 75])
def test_a_token_of_several_vectors_is_in_one_chunk(before: int, token: str) -> None:
    tokenizer = sd15.tokenizer()
    names = [prompting.vector_name(token, k) for k in range(8)]
    tokenizer.add_tokens([*names, "<other>"])
    *several, other = tokenizer.convert_tokens_to_ids([*names, "<other>"])
    ids, _ = prompting.tokenised(tokenizer, ["cat " * before + " ".join(names) + " <other>" * 70])
    chunks = [[t for t in c if t in several] for c in ids[0].tolist()]
    assert several in chunks and sum(map(len, chunks)) == len(several)
    assert (other in ids[0, 0]) == (before + len(several) < 75)  # the next token is a word of its own


def test_the_model_reads_plain_prompts_as_before(backbone: Backbone) -> None:
    prompts = ["a dog", ""]
    assert torch.equal(backbone.encode(prompts), backbone.states(backbone.tokenise(prompts)))


def test_the_model_reads_long_and_weighed_prompts(backbone: Backbone) -> None:
    positions = backbone.tokenizer.model_max_length
    long = backbone.encode(["a dog and a barn " * 40, "a dog"])
    assert long.shape[1] > positions and long.shape[1] % positions == 0
    assert torch.equal(long[1, :positions], backbone.encode(["a dog"])[0])
    assert not torch.equal(backbone.encode(["a (dog:1.5)"]), backbone.encode(["a dog"]))
