"""PEFT's patterns: what they name is what Python's expressions would, and nobody's pattern takes long."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.formats import patterns, peft_config

Q = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("to_q", True),
        ("o_q", False),  # a name begins behind a dot
        ("attn1.to_q", True),
        (r"attn1\.to_q", True),
        (".*attn1.*", True),
        ("attn[12].to_(q|v)", True),
        (r"down_blocks\.\d\..*to_q", True),
        (r"down_blocks\.\d+\..*?\.to_q$", True),
        (f"^{Q}$", True),
        ("^attn1.to_q", False),
        ("up_blocks.*", False),
        ("attn2.*|to_(?:q|k)", True),
        ("attn1.to_q.", False),
        ("[^.]+", True),
        (r"\w+.to_q", True),
        ("attn1?.to_q", True),
        ("", False),
    ],
)
def test_a_pattern_names_what_it_names_for_peft(pattern: str, named: bool) -> None:
    assert (re.match(rf"(.*\.)?({pattern})$", Q) is not None) == named
    assert (get_pattern_key([pattern], Q) == pattern) == named
    assert patterns.read(pattern).names(Q) == named


ATOM = st.sampled_from(
    [
        "a",
        "b",
        "_",
        "1",
        ".",
        r"\.",
        r"\d",
        r"\w",
        "[ab]",
        "[^a]",
        "[a-b1]",
        "[]_.-]",
        "[^]b-]",
        "[0-a-.]",
        "[-b]",
    ]
)
PIECE = st.tuples(ATOM, st.sampled_from(["", "*", "+", "?", "*?"])).map("".join)
PATTERN = st.recursive(
    st.lists(PIECE, min_size=1, max_size=4).map("".join),
    lambda inner: st.tuples(inner, inner, inner).map(lambda p: f"{p[0]}({p[1]}|{p[2]})"),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.sampled_from(["", "^"]), PATTERN, st.sampled_from(["", "$"])).map("".join),
    st.text("ab_1.", max_size=12),
)
def test_it_agrees_with_pythons_own_engine(pattern: str, path: str) -> None:
    assert patterns.read(pattern).names(path) == (re.match(rf"(.*\.)?({pattern})$", path) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|a)*b", "a{9}", r"(a)\1", "(?=a)", "(", ")", "[", "[]", "[^]", "*", "a**", "[b-a]", "é\n"],
)
def test_what_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="of which not all is understood; write the names"):
        patterns.read(pattern)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the steps that expressions take over names."""
    counted, moved = Counter[str](), patterns._moved

    def counting(*args: Any) -> int:
        counted["steps"] += 1
        return moved(*args)

    monkeypatch.setattr(patterns, "_moved", counting)
    return counted


def test_no_pattern_is_long_or_takes_more_steps_than_it_has_characters(moves: Counter[str]) -> None:
    with pytest.raises(UserError, match=f"at most {limits.MAX_PATTERN_CHARS} are read"):
        patterns.read("a" * (limits.MAX_PATTERN_CHARS + 1))
    for pattern in (".*a" * 80 + "b", "(a|a|.)" * 32 + "b"):
        moves.clear()
        assert not patterns.read(pattern).names("a." * 120)
        assert 0 < moves["steps"] <= len(pattern)


LAYERS = [
    f"unet.down_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1.to_q"
    for i in range(20)
    for j in range(20)
]


@pytest.mark.parametrize("spelling", ["{}", r"^{}$"])
def test_a_name_for_every_layer_takes_no_steps(spelling: str, moves: Counter[str]) -> None:
    told = {spelling.format(name.removeprefix("unet.")): k for k, name in enumerate(LAYERS)}
    scales = peft_config.scales(LAYERS, {"alpha_pattern": told})
    assert not moves
    assert [scales[name].alpha for name in LAYERS] == list(range(400))


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(lambda k: "".join(f"[^{chr(0x4E00 + 36 * k + i)}]?" for i in range(36)), id="classes"),
        pytest.param(lambda k: "".join(f"{chr(0x4E00 + 99 * k + i)}?" for i in range(99)), id="characters"),
        pytest.param(lambda k: ".*a" * 60 + str(k), id="stars"),
    ],
)
def test_many_patterns_of_many_layers_take_few_steps_or_are_refused(
    pattern: Callable[[int], str], moves: Counter[str]
) -> None:
    told = {pattern(k): 1 for k in range(100)}
    peft_config.scales(LAYERS[:40], {"alpha_pattern": told})
    assert 0 < moves["steps"] <= 2_000_000
    with pytest.raises(UserError, match="100 patterns of alpha for 400 layers, .* at most 2,000,000 are"):
        peft_config.scales(LAYERS, {"alpha_pattern": told})
