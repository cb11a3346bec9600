"""Prompts as people write them: `(word:1.2)` weighs a word, and a long text is read in several pieces.

The notation is that of A1111: `(word)` 1.1 times, `[word]` 1/1.1 times, `(word:1.2)` 1.2 times as strong; brackets
nest; a backslash makes a bracket plain. A bracket without a partner is plain, too. What follows the word `BREAK` is
read apart from what stands before it, in a further piece; a backslash makes it a word like others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from iteris_sd import limits
from iteris_sd.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer

_STEP = 1.1  # what a bare pair of brackets weighs
_PARTNER = {")": "(", "]": "["}
_BREAK = r"\bBREAK\b"
_ESCAPED = re.compile(rf"[()\[\]\\]|{_BREAK}")
_MARKS = re.compile(
    rf"\\(?:{_ESCAPED.pattern})|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\s*{_BREAK}\s*"
    rf"|(?:(?!\s*{_BREAK})[^\\()\[\]:])+|[\\:]"
)
_END_OF_WORD = "</w>"
_SOUND_MEAN = 0.02  # of the RMS, from where a mean is one: those of Storybook's text states stay below 0.01


@dataclass(frozen=True)
class Piece:
    """Words of a prompt and how strongly they count; 1 is plain.

    `apart`: whether they are no words but a BREAK, whose text is the space that it leaves.
    """

    text: str
    weight: float = 1.0
    apart: bool = False


def parse(prompt: str) -> list[Piece]:
    """The pieces of a prompt, in order, neighbours of different weights or with a BREAK between them.

    Raises UserError for a weight too large and for too many BREAKs.
    """
    pieces: list[Piece] = []
    opened: list[
        tuple[str, int]
    ] = []  # each open bracket, and which piece stands for it until its partner comes
    for mark in _MARKS.findall(prompt):
        closing = mark[-1] if len(mark) == 1 or mark[0] == ":" else ""
        if mark in ("(", "["):
            opened.append((mark, len(pieces)))
            pieces.append(Piece(mark))
        elif closing in _PARTNER and opened and opened[-1][0] == _PARTNER[closing]:
            bracket, start = opened.pop()
            factor = float(mark[1:-1]) if mark[0] == ":" else _STEP if bracket == "(" else 1 / _STEP
            inner = [
                piece if piece.apart else replace(piece, weight=piece.weight * factor)
                for piece in pieces[start + 1 :]
            ]
            pieces[start:] = [Piece(""), *inner]
        elif mark.strip() == "BREAK":
            pieces.append(Piece(" ", apart=True))
        else:
            pieces.append(Piece(mark[1:] if mark[0] == "\\" and len(mark) > 1 else mark))
    return _checked(_joined(pieces))


def plain(prompt: str) -> str:
    """The words of a prompt without the marks of weight: what a scorer reads."""
    return "".join(piece.text for piece in parse(prompt))


def escaped(words: str) -> str:
    """Words that are to be read as they stand, brackets and all."""
    return _ESCAPED.sub(r"\\\g<0>", words)


def vector_name(token: str, k: int) -> str:
    """What the tokenizer calls vector k of a learned token of several: 0 is the token itself."""
    return f"{token}_{k}" if k else token


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of the same weight in one."""
    joined: list[Piece] = []
    for piece in pieces:
        alike = joined and joined[-1].weight == piece.weight and not (piece.apart or joined[-1].apart)
        if alike:
            joined[-1] = replace(joined[-1], text=joined[-1].text + piece.text)
        elif piece.text:
            joined.append(piece)
    return joined


def _checked(pieces: list[Piece]) -> list[Piece]:
    for piece in pieces:
        if not 0 <= piece.weight <= limits.MAX_PROMPT_WEIGHT:
            raise UserError(
                f"In the prompt, {piece.text.strip()[:40]!r} has the weight {piece.weight:g}; weights go from 0 to "
                f"{limits.MAX_PROMPT_WEIGHT:g}."
            )
    breaks = sum(piece.apart for piece in pieces)
    if breaks > limits.MAX_BREAKS:
        raise UserError(f"The prompt has {breaks} BREAKs; at most {limits.MAX_BREAKS} are allowed.")
    return pieces


def tokenised(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids (n, chunks, positions) int64 of prompts, and their weights, the same shape.

    A text that is longer than the encoder goes on in a further chunk, at a word's end, and so does one at a BREAK;
    shorter ones are filled up with chunks of nothing. Raises UserError as `parse`.
    """
    import torch

    room = tokenizer.model_max_length - 2  # a mark at each end
    begin, end, filling = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    parts = [_chunks(_weighted_words(tokenizer, prompt), room) for prompt in prompts]
    most = max(map(len, parts))
    ids = torch.full((len(parts), most, room + 2), filling, dtype=torch.int64)
    weights = torch.ones(ids.shape)
    ids[:, :, 0], ids[:, :, 1] = begin, end
    for n, chunks in enumerate(parts):
        for c, chunk in enumerate(chunks):
            for k, (token, weight) in enumerate(chunk, start=1):
                ids[n, c, k], weights[n, c, k] = token, weight
            ids[n, c, len(chunk) + 1] = end
    return ids, weights


def _weighted_words(tokenizer: CLIPTokenizer, prompt: str) -> list[list[tuple[int, float]]]:
    """The words of a prompt, each as its tokens and their weight; a learned token's vectors are one word.

    A word without tokens is a BREAK.
    """
    added = set(tokenizer.get_added_vocab().values())  # ids: names come back in lower case
    words: list[list[tuple[int, float]]] = []
    ended, learned = True, None  # whether the last word is whole, and which learned token it began with
    for piece in parse(prompt):
        if piece.apart:
            words.append([])
            ended, learned = True, None
        ids = tokenizer(piece.text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        for token, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
            further = learned is not None and name == vector_name(learned, len(words[-1]))
            if not further:
                learned = name if token in added else None
                if ended or learned is not None:
                    words.append([])
            words[-1].append((token, piece.weight))
            ended = token in added or name.endswith(_END_OF_WORD)
    return words


def _chunks(words: Sequence[Sequence[tuple[int, float]]], room: int) -> list[list[tuple[int, float]]]:
    """Words in chunks of at most `room` tokens; an empty word begins a chunk, and only one longer than that is cut."""
    chunks: list[list[tuple[int, float]]] = [[]]
    for word in words:
        if not word or (len(chunks[-1]) + len(word) > room and chunks[-1]):
            chunks.append([])
        chunks[-1].extend(word)
        while len(chunks[-1]) > room:
            chunks[-1:] = [chunks[-1][:room], chunks[-1][room:]]
    return chunks


def weighed(states: Tensor, weights: Tensor) -> Tensor:
    """Text states (n, tokens, width) of single chunks times weights (n, tokens), brought back to how strong they were.

    Each chunk's mean stays what it was, as in A1111 (its "original" emphasis, one prompt at a time), which was made for
    CLIP's states. A mean near zero is a remainder of cancellation, and the ratio of two such would scale all words by
    anything; so where it is one, or turns over, the root of the mean square stays what it was instead.
    """
    scaled = states * weights.unsqueeze(-1).to(states)
    (mean, rms), (new_mean, new_rms) = (_mean_and_rms(x.float()) for x in (states, scaled))
    sound = (mean.abs() > _SOUND_MEAN * rms) & (new_mean * mean.sign() > _SOUND_MEAN * new_rms)
    ratio = (mean / new_mean).where(sound, rms / new_rms)
    plain = (weights == 1).all(dim=1)[:, None, None].to(ratio.device)
    return scaled * ratio.masked_fill(plain | (new_rms == 0), 1.0).to(states.dtype)


def _mean_and_rms(states: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of (n, tokens, width), (n, 1, 1)."""
    return states.mean(dim=(1, 2), keepdim=True), states.square().mean(dim=(1, 2), keepdim=True).sqrt()
