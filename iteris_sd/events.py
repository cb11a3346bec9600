"""What happens on the road from a recipe to pictures, as values; all that a page or a terminal sees of it."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from iteris_sd.errors import UserError
from iteris_sd.generators import relayed
from iteris_sd.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from iteris_sd.calibration import Merged
    from iteris_sd.concepts import Loaded
    from iteris_sd.scoring import Score

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Preview:
    """What pictures look like while they are drawn, by column and seed; `scene` as `Picture` has it."""

    scene: str
    pictures: Mapping[tuple[str, int], Image.Image]


@dataclass(frozen=True)
class Progress:
    """What is being done, in words, and how far it is: `done` of `total`.

    `at_once`: how many pictures are drawn together, 0 while none are; then there is a preview now and then.
    """

    stage: str
    done: int
    total: int
    preview: Preview | None = None
    at_once: int = 0


@dataclass(frozen=True, eq=False)
class MergeDone:
    """A method's merged LoRA of these `concepts` is ready.

    `remembered`: it was made before, of the same files by the same numbers. `key`: what it is remembered under.
    """

    method: str
    merged: Merged
    concepts: tuple[Loaded, ...]
    seconds: float
    remembered: bool = False
    key: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """One finished picture, its scores, and the prompt it was drawn from.

    `method`: the column of the recipe. `flagged`: it is blank, by the safety checker or because its numbers overflowed.
    `scene`: the one concept that it is of, where it shows what was retained of it; empty for one of the composition.
    """

    method: str
    seed: int
    image: Image.Image
    prompt: str
    score: Score
    flagged: bool = False
    scene: str = ""


@dataclass(frozen=True, eq=False)
class Composition:
    """Everything a recipe led to; the last event.

    `retained`: each concept alone, by its own LoRA and by each merged adapter. `seconds` by stage.
    """

    recipe: Recipe
    concepts: tuple[Loaded, ...]
    merged: Mapping[str, Merged]
    pictures: tuple[Picture, ...]
    scorer: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    retained: tuple[Picture, ...] = ()

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The learned tokens of all concepts."""
        return {token: vectors for one in self.concepts for token, vectors in one.tokens.items()}

    def picture(self, method: str, seed: int) -> Picture | None:
        """The picture of one method and seed, if it was drawn."""
        return next((p for p in self.pictures if (p.method, p.seed) == (method, seed)), None)


Event = Progress | MergeDone | Picture | Composition


def downloading(work: Generator[tuple[int, int], None, T], what: str) -> Generator[Progress, None, T]:
    """Pass on the bytes of a download as progress in kilobytes, its size in words, and return its result."""
    from iteris_sd import hub

    def told(bytes: tuple[int, int]) -> Progress:
        done, total = bytes
        stage = f"Downloading {what}, once: {hub.readable(total)}"
        return Progress(stage, done // 1000, max(1, total // 1000))

    return relayed(work, told)


# ---------------------------------------------------------------- to another process


@dataclass(frozen=True)
class Failure:
    """That work in another process failed. `told`: the sentence of a UserError; `trace`: of anything else."""

    told: str = ""
    trace: str = ""


def sent(work: Generator[Any, None, Any]) -> Generator[bytes, None, None]:
    """What work yields, in bytes for another process; what it fails of comes last, as a `Failure`.

    Bytes, since queues between processes pass tensors on as shared memory, and each of those keeps a file open.
    """
    with closing(work):
        try:
            for event in work:
                yield pickle.dumps(event)
        except UserError as error:
            yield pickle.dumps(Failure(told=str(error)))
        except Exception:
            yield pickle.dumps(Failure(trace=traceback.format_exc()))


def received(parts: Generator[bytes, None, Any]) -> Generator[Any, None, None]:
    """What `sent` put into bytes, in a process of our own.

    Raises UserError where the work did, and RuntimeError with the trace where it failed of anything else.
    """
    with closing(parts):
        for part in parts:
            event = pickle.loads(part)
            if isinstance(event, Failure):
                raise UserError(event.told) if event.told else RuntimeError(event.trace)
            yield event
