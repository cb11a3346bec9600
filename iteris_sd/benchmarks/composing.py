"""`bench compose`: how well methods compose, by alignment scores over many pairs of concepts, prompts and seeds.

Every pair of the concepts is drawn in the same prompts from the same noise by each method, and by the base model
without any LoRA. Pictures of a pair are alike, so a pair counts as one: the mean of its pictures is its value, and
intervals are over pairs (Student's t). Differences to the linear average are taken picture by picture, then likewise.
They hold for this base model, these concepts and this scorer, and for what a scorer sees.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iteris_sd import bases, composer, intervals, limits, presets, scoring
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Event, Progress
from iteris_sd.recipe import BASE_COLUMN, Recipe, title

TO = intervals.BASELINE
MEASURES = {"text": "text", "minimum": "least image", "crop_minimum": "least part"}


@dataclass(frozen=True)
class Job:
    """What is drawn: every pair of `concepts`, in so many of the prompts that suit it, by so many seeds each."""

    concepts: tuple[str, ...]
    methods: tuple[str, ...]
    base: str = "storybook"
    prompts: int = 4
    seeds: int = 1

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every two of the concepts."""
        return list(itertools.combinations(self.concepts, 2))


@dataclass(frozen=True)
class Shot:
    """One picture's place in the job, and its scores by name (`scoring.measures`)."""

    pair: tuple[str, str]
    prompt: str
    seed: int
    method: str
    scores: Mapping[str, float]


Keep = Callable[[Iterable[Shot]], None]  # what is done with scores as soon as they are there


@dataclass(frozen=True)
class Figure:
    """A method's mean of one measure over `pairs` pairs with `pictures` pictures in all, and its 95 % interval.

    `more`: what it has more than the linear average on the same prompts and seeds, None of that itself; with its
    interval. Intervals are None for one pair.
    """

    method: str
    measure: str
    pairs: int
    pictures: int
    mean: float
    low: float | None
    high: float | None
    more: float | None = None
    more_low: float | None = None
    more_high: float | None = None


def job(
    library: Library,
    base: str,
    concepts: Sequence[str],
    methods: Sequence[str],
    prompts: int,
    seeds: int,
) -> Job:
    """The job for these concepts, all of the base model where none are named. Raises UserError for fewer than two."""
    names = tuple(concepts) or tuple(one.name for one in library.of_base(bases.find(base).family))
    if len(set(names)) < 2:
        raise UserError(
            f"Pairs need two concepts at least, found {len(set(names))} for {bases.find(base).title}; name more, or "
            "choose another base model."
        )
    columns = dict.fromkeys((BASE_COLUMN, TO, *methods))
    return Job(tuple(dict.fromkeys(names)), tuple(columns), base, prompts, seeds)


def shots(job: Job, library: Library, keep: Keep | None = None) -> Generator[Event, None, list[Shot]]:
    """Compose everything; yield what happens meanwhile, return all pictures' scores. Raises UserError as `compose`.

    `keep` is given the pictures' scores as they come: hours of work are not lost with its last minute.
    """
    found: list[Shot] = []
    for done, pair in enumerate(job.pairs):
        yield Progress(f"{' and '.join(pair)}, pair {done + 1} of {len(job.pairs)}", done, len(job.pairs))
        for recipe in _recipes(job, pair):
            made = yield from composer.compose(recipe, library)
            new = [
                Shot(pair, recipe.prompt, picture.seed, picture.method, scoring.measures(picture.score))
                for picture in made.pictures
            ]
            found += new
            if keep is not None:
                keep(new)
    return found


def _recipes(job: Job, pair: tuple[str, str]) -> Iterator[Recipe]:
    """What is composed of a pair: each prompt with seeds of its own, so that noise differs from prompt to prompt."""
    most = limits.MAX_METHODS
    parts = [job.methods[k : k + most] for k in range(0, len(job.methods), most)]
    prompts = presets.prompts_for(pair)[: job.prompts]
    for (place, prompt), methods in itertools.product(enumerate(prompts), parts):
        first = place * job.seeds
        yield Recipe.of(
            {
                "concepts": [{"name": name} for name in pair],
                "prompt": prompt,
                "methods": [{"name": name} for name in methods],
                "seeds": list(range(first, first + job.seeds)),
                "base": job.base,
                **bases.find(job.base).drawing,
            }
        )


def figures(found: Iterable[Shot]) -> list[Figure]:
    """Every measure of every method, in the order in which the methods come."""
    found = list(found)
    places = {(shot.method, shot.pair, shot.prompt, shot.seed): shot.scores for shot in found}
    made = []
    for method, measure in itertools.product(dict.fromkeys(shot.method for shot in found), MEASURES):
        own: dict[tuple[str, str], list[float]] = {}
        more: dict[tuple[str, str], list[float]] = {}
        for (of, pair, prompt, seed), scores in places.items():
            if of != method or measure not in scores:
                continue
            own.setdefault(pair, []).append(scores[measure])
            theirs = places.get((TO, pair, prompt, seed), {})
            if method != TO and measure in theirs:
                more.setdefault(pair, []).append(scores[measure] - theirs[measure])
        if own:
            count = sum(map(len, own.values()))
            difference = _over_pairs(more) if more else (None, None, None)
            made.append(Figure(method, measure, len(own), count, *_over_pairs(own), *difference))
    return made


def _over_pairs(values: Mapping[Any, Sequence[float]]) -> tuple[float, float | None, float | None]:
    return intervals.mean_and_interval([sum(several) / len(several) for several in values.values()])


def table(path: Path) -> Keep:
    """What adds a row a picture to `path`, begun anew here. Raises UserError when it cannot be written, then as now."""

    def add(rows: Iterable[Sequence[Any]], mode: str = "a") -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode, newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error}).") from error

    add([("one", "other", "prompt", "seed", "method", *MEASURES)], "w")
    return lambda found: add(
        (*shot.pair, shot.prompt, shot.seed, shot.method, *(shot.scores.get(name, "") for name in MEASURES))
        for shot in found
    )


def described(job: Job, found: Sequence[Figure]) -> dict[str, Any]:
    """Everything as plain values for JSON."""
    return {"job": asdict(job), "scorer": bases.find(job.base).scorer, "figures": [asdict(f) for f in found]}


def rows(found: Sequence[Figure]) -> list[tuple[str, ...]]:
    """A row for each method: its title, and of each measure the mean, with what it has more than the linear average."""
    by_method: dict[str, dict[str, Figure]] = {}
    for figure in found:
        by_method.setdefault(figure.method, {})[figure.measure] = figure
    return [
        (title(method), *(_told(own[measure]) if measure in own else "" for measure in MEASURES))
        for method, own in by_method.items()
    ]


def _told(figure: Figure) -> str:
    words = f"{figure.mean:.3f}"
    if figure.more is None:
        return words
    if figure.more_low is None or figure.more_high is None:
        return f"{words} ({figure.more:+.3f})"
    return f"{words} ({figure.more:+.3f}, {figure.more_low:+.3f} to {figure.more_high:+.3f})"
