"""Guess a concept's trigger and class noun from what a LoRA file says of itself, and from its name.

Metadata come from strangers: what is malformed or too long is passed over, and nothing raises.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iteris_sd import hub, limits
from iteris_sd.concepts import USUAL_STEMS, Concept, in_words, tidy

if TYPE_CHECKING:
    from iteris_sd.formats import LoraFile

_OPENING = re.compile(
    r"(?:(?:an?|the)\s+)?(?:\w+\s+)?(?:photo|photograph|picture|image|painting|drawing|portrait)\s+of\s+"
    r"(?:(?:an?|the)\s+)?|an?\s+",
    re.IGNORECASE,
)  # of a prompt: "a close photo of a …"
_TOKEN = re.compile(r"<[^<>\s]+>")
_KOHYA_FOLDER = re.compile(r"(\d{1,6})_(\S.*)")  # its repeats, a made-up word and often a class: "10_sks dog"
_SAID_NOTHING = ("None", "null")  # by programs that write a value that is not there
_NOTHING = "subject"  # for a file of which nothing is known, not even a name


@dataclass(frozen=True)
class Guess:
    """A trigger, a class noun, and where the trigger was found, in words for people."""

    trigger: str
    class_noun: str
    source: str


def guess(metadata: Mapping[str, str], tokens: Collection[str], stem: str) -> Guess:
    """The likeliest trigger and class noun of a LoRA with these metadata and learned tokens.

    `stem`: what the file is called, or its folder where that says nothing.
    """
    phrase = _phrase(metadata.get("modelspec.trigger_phrase"))
    prompt = _phrase(metadata.get("instance_prompt"))
    settings, folder = _subset(metadata), _folder(metadata)
    name = in_words(stem)[: limits.MAX_NAME_CHARS].strip() or _NOTHING
    noun = next((noun for noun in map(_noun, (phrase, prompt, settings, folder)) if noun), "")
    # Where a file brings tokens, its trainer has put them in the place of the prompt's made-up word.
    whole = not tokens or any(token in prompt for token in tokens)
    found = {
        "its trigger phrase (modelspec.trigger_phrase)": phrase,
        "the prompt it was trained with (instance_prompt)": prompt if whole else "",
        "its learned tokens": _joined(tokens, noun) or _joined(tokens, ""),
        "the training settings (ss_datasets)": settings,
        "the training folders (ss_tag_frequency)": folder,
    }
    for source, trigger in found.items():
        if trigger:
            return Guess(trigger, noun or name, source)
    if tag := _tag(metadata):
        # Of a made-up word and a class; what longer tags say, or those of one word, is no class.
        own = _noun(tag) if len(tag.split()) == 2 else ""
        return Guess(tag, noun or own or name, "the most frequent tag (ss_tag_frequency)")
    return Guess(name, noun or name, "the file's name")


def concept(source: Path, content: LoraFile, origin: str = "") -> Concept:
    """A concept from a bare LoRA file or PEFT's folder, all its words guessed; its base, Stable Diffusion v1.5.

    `origin`: where it came from, such as an id on the Hub, where that is not its file's name.
    """
    stem = _stem(source, origin)
    name, title = (words[: limits.MAX_NAME_CHARS] for words in (stem, in_words(stem)))
    found = guess(content.metadata, content.tokens, stem)
    told = origin or source.name
    return Concept(name, title, found.trigger, found.class_noun, source, base="sd15", source=told)


def _stem(source: Path, origin: str) -> str:
    """What a LoRA is called: its file, or its repository or folder where the file is called as all are."""
    stem = source.name if source.is_dir() else source.stem
    if stem not in USUAL_STEMS:
        return stem
    id = hub.parse(origin)
    return (id.repo.rpartition("/")[2] if id else source.absolute().parent.name) or stem


def _phrase(text: object) -> str:
    """The trigger in a prompt or a tag; nothing where there is none, or a long one."""
    if not isinstance(text, str) or len(text) > limits.MAX_PROMPT_CHARS or text in _SAID_NOTHING:
        return ""
    return _short(_OPENING.sub("", tidy(text.partition(",")[0]), count=1))


def _short(words: str) -> str:
    return words if len(words) <= limits.MAX_NAME_CHARS else ""


def _noun(trigger: str) -> str:
    """The class in a trigger such as "sks dog" or "<rex> dog": all but the made-up words."""
    plain = tidy(_TOKEN.sub(" ", trigger))
    return plain if plain != trigger else plain.partition(" ")[2]


def _joined(tokens: Collection[str], noun: str) -> str:
    """Learned tokens as they stand in a prompt, and the noun behind them."""
    ordered = sorted(map(tidy, tokens), key=lambda token: (len(token), token))
    gap = "" if all(_TOKEN.fullmatch(token) for token in ordered) else " "
    return _short(tidy(f"{gap.join(ordered)} {noun}")) if ordered else ""


def _subset(metadata: Mapping[str, str]) -> str:
    """The words for the subject in kohya's settings file; of several, those of the folder most often repeated.

    Pictures of the class alone, trained on against forgetting, are marked there.
    """
    found: list[tuple[int, str]] = []
    for dataset in _rows(_parsed(metadata.get("ss_datasets"))):
        for subset in _rows(dataset.get("subsets")):
            words, repeats = _phrase(subset.get("class_tokens")), subset.get("num_repeats")
            if words and not subset.get("is_reg"):
                found.append((repeats if type(repeats) is int else 1, words))
    return max(found, key=lambda one: one[0])[1] if found else ""


def _rows(value: object) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _folder(metadata: Mapping[str, str]) -> str:
    """The made-up word and class in the name of kohya's training folder; of several, the one most often repeated.

    Folders of the class alone, trained on against forgetting, have one word or are repeated less. The only folder is
    that of the subject, with a class or without.
    """
    named = {
        name: None for key in ("ss_tag_frequency", "ss_dataset_dirs") for name in _table(metadata.get(key))
    }
    matches = [match for name in named if (match := _KOHYA_FOLDER.fullmatch(tidy(name)))]
    matches = [match for match in matches if _short(match[2]) and (" " in match[2] or len(named) == 1)]
    return max(matches, key=lambda match: int(match[1]))[2] if matches else ""


def _tag(metadata: Mapping[str, str]) -> str:
    """The tag that most captions have."""
    counts: Counter[str] = Counter()
    for tags in _table(metadata.get("ss_tag_frequency")).values():
        if isinstance(tags, dict):
            counts.update({tag: count for tag, count in tags.items() if type(count) is int})
    return next((words for tag, _ in counts.most_common() if (words := _phrase(tag))), "")


def _table(text: object) -> dict[str, Any]:
    found = _parsed(text)
    return found if isinstance(found, dict) else {}


def _parsed(text: object) -> object:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
