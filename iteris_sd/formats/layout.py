"""What the dialects tell the reader: which tensors of a file belong together, by the file's header alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from iteris_sd.errors import UserError
from iteris_sd.formats import naming

Role = Literal["down", "up", "mid", "alpha", "token"]
ROLES: Mapping[str, Role] = {
    "alpha": "alpha",
    "lora_down": "down",
    "lora_A": "down",
    "lora_up": "up",
    "lora_B": "up",
    "lora_mid": "mid",
}  # what the factors of kohya's names and of PEFT's are


@dataclass(frozen=True)
class Claim:
    """What one key of a file means: a ``role`` in the layer of a canonical ``name``, or the vectors of a token."""

    name: str
    role: Role


@dataclass(frozen=True)
class Scale:
    """How a layer is scaled where no tensor says so: ΔW = alpha / rank · up @ down, or by √rank."""

    alpha: float | None = None
    rank_stabilised: bool = False


class Dialect(Protocol):
    """One way of naming the tensors of a LoRA file; a module with this name and function is a dialect."""

    NAME: str

    def claim(self, key: str) -> Claim | None:
        """What a key means in this dialect; None if nothing."""


@dataclass(frozen=True)
class Pair:
    """The tensors of one layer, by key: ΔW = alpha / rank · up @ down (alpha = rank if unset).

    ``alpha`` names a tensor of one number. With ``mid`` a convolution is up · mid · down, down and up having kernels
    of one pixel (LoCon's Tucker form).
    """

    down: str
    up: str
    mid: str | None = None
    alpha: str | None = None


@dataclass(frozen=True)
class Layout:
    """Canonical layer name -> its tensors, learned token -> the key of its vectors, and the dialects of the keys, most
    spoken first."""

    layers: Mapping[str, Pair]
    tokens: Mapping[str, str]
    dialects: Sequence[str]


def sort(keys: Iterable[str], dialects: Sequence[Dialect]) -> Layout:
    """Sort a file's keys into layers and tokens; files may mix dialects.

    Raises UserError for a key that no dialect knows, a factor without partner, or a layer that is there twice.
    """
    found: dict[str, dict[str, str]] = {}
    tokens: dict[str, str] = {}
    spoken: list[str] = []
    for key in keys:
        claim, dialect = _claimed(key, dialects)
        spoken.append(dialect)
        place = tokens if claim.role == "token" else found.setdefault(claim.name, {})
        if (other := place.setdefault(claim.name if place is tokens else claim.role, key)) != key:
            raise UserError(f"It holds the {claim.role} of {claim.name} twice, as {other!r} and as {key!r}.")
    layers = {name: _pair(name, roles) for name, roles in found.items()}
    return Layout(layers, tokens, sorted(set(spoken), key=lambda name: (-spoken.count(name), name)))


def _claimed(key: str, dialects: Sequence[Dialect]) -> tuple[Claim, str]:
    for dialect in dialects:
        claim = dialect.claim(naming.uncompiled(key))
        if claim is not None:
            return claim, dialect.NAME
    known = ", ".join(dialect.NAME for dialect in dialects)
    raise UserError(f"It holds {key!r}, which is no part of a plain LoRA in any known layout ({known}).")


def _pair(name: str, roles: Mapping[str, str]) -> Pair:
    for role in ("down", "up"):
        if role not in roles:
            found = next(iter(roles.values()))
            raise UserError(
                f"It holds {found!r} without the {role} factor that belongs to it; the file is incomplete."
            )
    return Pair(roles["down"], roles["up"], roles.get("mid"), roles.get("alpha"))
