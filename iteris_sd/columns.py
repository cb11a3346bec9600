"""What the columns of a grid are: which adapter each draws with, and which words its prompt has.

A model knows only the triggers whose tokens and adapters are in it. So in the prompt of the base model every trigger
becomes its class noun, and in that of one concept's own LoRA all triggers but its own do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iteris_sd import bases, prompting
from iteris_sd.lora import LoRA
from iteris_sd.recipe import BASE_COLUMN, Recipe, alone, fill

if TYPE_CHECKING:
    from iteris_sd.concepts import Loaded

_OF_ONE = "a {} {}"  # what retention draws: one concept at the first place that the base model knows


@dataclass(frozen=True, eq=False)
class Column:
    """One column: the adapter it draws with, None for the base model's own, and the prompt it draws."""

    name: str
    lora: LoRA | None
    prompt: str


def weighted(recipe: Recipe, picked: Sequence[Loaded]) -> list[LoRA]:
    """The concepts' LoRAs, scaled by their weights: what is sampled and merged."""
    uses = zip(picked, recipe.concepts, strict=True)
    return [one.lora.scaled(use.weight).scaled_by_block(dict(use.blocks)) for one, use in uses]


def of_grid(recipe: Recipe, picked: Sequence[Loaded], adapters: Mapping[str, LoRA]) -> list[Column]:
    """The columns of a composition, in the recipe's order; `adapters`: by method, as strong as they are drawn."""
    whole, loras = prompt_with_triggers(recipe, picked), weighted(recipe, picked)
    every = {BASE_COLUMN: Column(BASE_COLUMN, None, prompt_for_base(recipe, picked))}
    for use, one, lora in zip(recipe.concepts, picked, loras, strict=True):
        prompt = prompt_without(recipe, [other for other in picked if other is not one], picked)
        every[alone(use.name)] = Column(alone(use.name), lora, prompt)
    every |= {name: Column(name, lora, whole) for name, lora in adapters.items()}
    return [every[name] for name in recipe.columns]


def of_retention(
    recipe: Recipe, name: str, one: Loaded, lora: LoRA, adapters: Mapping[str, LoRA]
) -> list[Column]:
    """What one concept alone, which the recipe calls `name`, is drawn by: its own `lora`, and each merged adapter."""
    prompt = _OF_ONE.format(prompting.escaped(one.concept.trigger), bases.find(recipe.base).places[0])
    return [Column(alone(name), lora, prompt), *(Column(m, made, prompt) for m, made in adapters.items())]


def prompt_with_triggers(recipe: Recipe, picked: Sequence[Loaded]) -> str:
    """The prompt that the merged model gets; brackets of a trigger are part of it, not marks of weight."""
    return fill(recipe.prompt, [prompting.escaped(one.concept.trigger) for one in picked])


def prompt_for_base(recipe: Recipe, picked: Sequence[Loaded]) -> str:
    """The prompt for the base model, which knows no learned tokens: triggers become class nouns, weights stay."""
    return prompt_without(recipe, picked, picked)


def prompt_without(recipe: Recipe, unknown: Sequence[Loaded], picked: Sequence[Loaded]) -> str:
    """The prompt for a model that does not know the concepts `unknown`, which are some of the `picked` ones."""
    known = [one for one in picked if one not in unknown]
    return _in_nouns(prompt_with_triggers(recipe, picked), unknown, known)


def prompt_in_plain_words(recipe: Recipe, picked: Sequence[Loaded]) -> str:
    """The prompt for the scorer: class nouns in place of triggers, and no marks of weight."""
    return prompting.plain(prompt_for_base(recipe, picked))


def in_plain_words(column: Column, one: Loaded) -> str:
    """The prompt of a column of retention as the scorer reads it."""
    return prompting.plain(_in_nouns(column.prompt, [one]))


def _in_nouns(prompt: str, unknown: Sequence[Loaded], known: Sequence[Loaded] = ()) -> str:
    """The prompt with class nouns for the triggers of concepts that are `unknown`, but not within those `known`."""
    plain: dict[str, str] = {}
    for one in unknown:
        plain |= {prompting.escaped(token).lower(): one.concept.class_noun for token in one.tokens}
    for one in unknown:
        plain[prompting.escaped(one.concept.trigger).lower()] = one.concept.class_noun
    if not plain:
        return prompt
    kept = {prompting.escaped(words).lower() for one in known for words in (one.concept.trigger, *one.tokens)}
    longest_first = sorted({*plain, *kept}, key=len, reverse=True)
    found = "|".join(rf"(?<!\w){re.escape(words)}(?!\w)" for words in longest_first)

    def said(words: re.Match[str]) -> str:
        noun = plain.get(words[0].lower())
        return words[0] if noun is None or words[0].lower() in kept else prompting.escaped(noun)

    return re.sub(found, said, prompt, flags=re.IGNORECASE)
