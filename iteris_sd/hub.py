"""What comes from the Hugging Face Hub: what a repository holds, what of it is here already, and fetching the rest.

Files go into the Hub's usual cache, by the Hub's own library.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Thread, current_thread
from typing import Any, NamedTuple

from iteris_sd import limits, serving
from iteris_sd.errors import UserError
from iteris_sd.files import nearest
from iteris_sd.formats import peft_files

_TICK = 0.1  # seconds between two reports
_PATIENCE = 10.0  # seconds that a server may be silent
_LISTED = 10  # files that a message names

_USUAL = ("pytorch_lora_weights.safetensors", peft_files.WEIGHTS)  # diffusers' name first
_TOKENS = ("*_emb.safetensors", "learned_embeds*.safetensors", "embeddings.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^:@\\]+))?(?:@(?P<revision>[\w.][\w./-]*))?", re.ASCII
)


@dataclass(frozen=True)
class Listing:
    """A repository at one commit: `revision` is the commit's hash, `files` are name -> bytes."""

    repo: str
    revision: str
    files: Mapping[str, int]


@dataclass(frozen=True)
class LoraId:
    """A LoRA on the Hub, written ``owner/name[:file][@revision]``.

    `file`: a .safetensors file or a folder that PEFT has saved into; None: the usual one of the repository.
    """

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file = f":{self.file}" if self.file else ""
        return f"{self.repo}{file}{'@' + self.revision if self.revision else ''}"


def readable(size: int) -> str:
    """A number of bytes for people: 2.7 GB, 340 kB."""
    amount, units = float(size), ["TB", "GB", "MB", "kB", "bytes"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop()
    small = amount < 9.95 and units[-1] != "bytes"
    return f"{amount:.{1 if small else 0}f} {units[-1]}"


def listing(repo: str, revision: str | None = None) -> Listing:
    """What a repository holds at a branch, tag or commit (None: now). Raises UserError when it cannot be seen."""
    from huggingface_hub import HfApi

    with _telling(repo):
        info = HfApi(token=_token()).model_info(
            repo, revision=revision, files_metadata=True, timeout=_PATIENCE
        )
    return Listing(repo, info.sha or "", {one.rfilename: one.size or 0 for one in info.siblings or ()})


def snapshots(repo: str) -> list[Path]:
    """The cached snapshots of a repository, whole or not, without any network.

    First the one that ``main`` was when last looked at, then from the newest to the oldest.
    """
    home = _home(repo)
    main = home / "refs" / "main"
    current = main.read_text().strip() if main.is_file() else ""
    return sorted(
        home.glob("snapshots/*"), key=lambda s: (s.name == current, s.stat().st_mtime), reverse=True
    )


def cached(repo: str, required: Sequence[str]) -> Path | None:
    """The first of `snapshots` that holds all of `required`; None when none does."""
    return next((s for s in snapshots(repo) if all((s / name).is_file() for name in required)), None)


def fetch(
    repo: str, names: Sequence[str], revision: str, cache: Path | None = None
) -> Generator[tuple[int, int], None, Path]:
    """Download the files `names` at `revision`; yield (bytes done, bytes in all), return the snapshot.

    They go into the Hub's usual cache, or into a cache of one's own in the folder `cache`. Yields at least four times
    a second. Closing it stops the download at once, or, of a file in Xet storage, after that file, which cannot be
    broken off; the files that have come are kept. Raises UserError when they cannot be had or do not fit on the disk.
    """
    there = listing(repo, revision)
    if unknown := [name for name in names if name not in there.files]:
        raise UserError(f"{repo} has no file {unknown[0]} at {revision}.")
    download = _Download(there, names, cache)
    download.check_room()
    download.start()
    try:
        shown = 0
        while download.is_alive():
            shown = max(shown, min(download.done, download.total))  # a broken line begins its file anew
            yield shown, download.total
            download.join(_TICK)
    finally:
        download.stopped = True
    if download.problem is not None:
        raise download.problem
    if missing := download.missing:
        raise UserError(
            f"{repo} has not come whole: {missing[0]} is not in {download.folder}; try again, and see whether "
            "something else empties that folder."
        )
    yield download.total, download.total
    return download.folder


class _Stopped(Exception):
    """Nobody waits for this download any more."""


class _Download(Thread):
    """Files on their way into a cache. `done`, `total`: bytes; `problem`: what went wrong."""

    def __init__(self, listing: Listing, names: Sequence[str], cache: Path | None) -> None:
        super().__init__(name="hub", daemon=True)
        self.listing, self.names, self.cache = listing, names, cache
        self.folder = _home(listing.repo, cache) / "snapshots" / listing.revision
        self.done, self.total = 0, sum(listing.files[name] for name in names)
        self.stopped = False
        self.problem: UserError | None = None

    @property
    def missing(self) -> list[str]:
        """The files that are not there."""
        return [name for name in self.names if not (self.folder / name).is_file()]

    def check_room(self) -> None:
        """Raise UserError when the disk has less room than what is yet to come takes."""
        needed = sum(self.listing.files[name] for name in self.missing)
        place = nearest(self.folder)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"Fetching {self.listing.repo} needs {readable(needed)} and the disk of its cache, {place}, has "
                f"{readable(free)} free; make room, or set HF_HUB_CACHE to a folder on a larger disk."
            )

    def run(self) -> None:
        """Fetch the files one after the other, until somebody says stop."""
        try:
            with _telling(self.listing.repo):
                self._fetch()
        except UserError as error:
            self.problem = error
        except _Stopped:
            pass

    def _fetch(self) -> None:
        from huggingface_hub import hf_hub_download

        repo, revision, before = self.listing.repo, self.listing.revision, 0
        for name in self.names:
            self.look()
            size = self.listing.files[name]
            bar = _counting(self, before, size)
            hf_hub_download(
                repo, name, revision=revision, cache_dir=self.cache, token=_token(), tqdm_class=bar
            )
            before += size
            self.done = before

    def look(self) -> None:
        """Raise _Stopped where nobody waits any more; in this thread, since Xet's own would print it and go on."""
        if self.stopped and current_thread() is self:
            raise _Stopped


def _counting(download: _Download, before: int, size: int) -> Any:
    """A progress bar as the library wants one, which shows nothing and counts the bytes of a file of `size`.

    `before`: bytes of the files before it. Over Xet one bar hears of two things, which each add up to the file: what
    has come over the network, and what is written of it.
    """
    from tqdm import tqdm

    class Counting(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.written = self.transferred = 0

        def update(self, n: float | None = 1) -> None:
            self.written += int(n or 0)
            self.tell()

        def update_transfer(self, n: float | None = 1) -> None:
            self.transferred += int(n or 0)
            self.tell()

        def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
            pass

        def tell(self) -> None:
            download.look()
            download.done = before + min(max(self.written, self.transferred), size)

    return Counting


def parse(text: str) -> LoraId | None:
    """Read ``owner/name[:file][@revision]``; None when it is no such id. A relative path may look like one."""
    found = _ID.fullmatch(text.strip())
    if found is None:
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo, file, revision = found["repo"], found["file"], found["revision"]
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return None
    steps = [*(file.split("/") if file else []), *(revision.split("/") if revision else [])]
    if any(step.strip() in ("", ".", "..") or not step.isprintable() for step in steps):
        return None
    return LoraId(repo, file, revision)


def lora_files(wanted: LoraId, most: int | None = None) -> tuple[Listing, list[str]]:
    """The repository of a LoRA and the files to fetch: the LoRA itself first, then what belongs to it.

    `most`: how many bytes the LoRA may have; those of a large one unless given. Raises UserError when there is no LoRA,
    several to choose from, only pickles, one that is too large, or more learned tokens than a concept has.
    """
    found = listing(wanted.repo, wanted.revision)
    name = _named(wanted.file, wanted, found.files) if wanted.file else _usual(wanted, found.files)
    folder = name[: name.rfind("/") + 1]
    config = f"{folder}{peft_files.CONFIG}"
    names = [name, config] if name == folder + peft_files.WEIGHTS and config in found.files else [name]
    most = limits.MAX_FILE_BYTES if most is None else most
    for one, bound in zip(names, (most, limits.MAX_CONFIG_BYTES), strict=False):
        if found.files[one] > bound:
            raise UserError(
                f"{one} of {wanted.repo} has {readable(found.files[one])} and at most {readable(bound)} are read "
                "here; choose a smaller LoRA."
            )
    tokens = [
        one
        for one, size in found.files.items()
        if one != name and _is_token(one, folder) and size <= limits.MAX_EMBEDDING_BYTES
    ]
    if len(tokens) > limits.MAX_EMBEDDINGS:
        raise UserError(
            f"{wanted.repo} holds {len(tokens)} files of learned tokens beside {name}, and a concept has at most "
            f"{limits.MAX_EMBEDDINGS}; download the LoRA and the tokens that you want, and add them as files."
        )
    return found, [*names, *tokens]


class Fetched(NamedTuple):
    """A LoRA from the Hub: where its file and those of its learned tokens lie, and the commit."""

    file: Path
    tokens: tuple[Path, ...]
    revision: str


def fetch_lora(
    wanted: LoraId,
    cache: Path | None = None,
    check: Callable[[int], None] = lambda size: None,
    most: int | None = None,
) -> Generator[tuple[int, int], None, Fetched]:
    """Download a LoRA and its learned tokens as `fetch` does.

    `check` hears how many bytes it has before they come, and may raise; `most`: how many the LoRA may have.
    """
    there, names = lora_files(wanted, most)
    check(sum(there.files[name] for name in names))
    folder = yield from fetch(there.repo, names, there.revision, cache)
    first, *more = [folder / name for name in names]
    return Fetched(first, tuple(path for path in more if path.suffix == ".safetensors"), there.revision)


def _named(file: str, wanted: LoraId, files: Mapping[str, int]) -> str:
    """The file that was asked for, or the weights in the folder that was."""
    if file in files and file.endswith(".safetensors"):
        return file
    if (weights := f"{file}/{peft_files.WEIGHTS}") in files:
        return weights
    if pickles := [n for n in files if (n == file or n.startswith(f"{file}/")) and n.endswith(_PICKLES)]:
        raise _pickled(wanted.repo, pickles)
    if file in files:
        raise UserError(f"{file} of {wanted.repo} is no LoRA file; those end in .safetensors.")
    choice = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    raise UserError(f"{wanted.repo} has no {file}; it holds {_listed(choice) or 'no .safetensors file'}.")


def _usual(wanted: LoraId, files: Mapping[str, int]) -> str:
    """The LoRA of a repository of which no file was named."""
    for usual in _USUAL:
        if usual in files:
            return usual
    loras = {n: size for n, size in files.items() if n.endswith(".safetensors") and not _is_token(n)}
    top = {name: size for name, size in loras.items() if "/" not in name}
    if len(top) == 1:
        return next(iter(top))
    if choice := top or loras:
        example = replace(wanted, file=next(iter(choice)))
        raise UserError(f"Which LoRA of {wanted.repo}? It holds {_listed(choice)}; name one, as {example}.")
    if pickles := [name for name in files if name.endswith(_PICKLES)]:
        raise _pickled(wanted.repo, pickles)
    raise UserError(f"{wanted.repo} holds no LoRA: there is no .safetensors file in it.")


def _is_token(name: str, folder: str | None = None) -> bool:
    """Whether a file is called as learned tokens are, in `folder` where one is given."""
    place, file = name[: name.rfind("/") + 1], name.rpartition("/")[2]
    return folder in (None, place) and any(fnmatchcase(file, pattern) for pattern in _TOKENS)


def _pickled(repo: str, pickles: Sequence[str]) -> UserError:
    return UserError(
        f"{repo} has {pickles[0]} and no .safetensors of it; a pickle can run any code when it is opened, so none is "
        "ever loaded: ask its author for safetensors, or convert it at "
        "https://huggingface.co/spaces/safetensors/convert."
    )


def _listed(files: Mapping[str, int]) -> str:
    shown = [f"{name} ({readable(size)})" for name, size in files.items()]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more


def _home(repo: str, cache: Path | None = None) -> Path:
    """Where a cache, the usual one unless given, keeps a repository, as the Hub's documentation has it."""
    from huggingface_hub import constants

    return (cache or Path(constants.HF_HUB_CACHE).expanduser()) / "--".join(("models", *repo.split("/")))


def _token() -> bool | None:
    """Whose eyes to look with: this machine's user's, but nobody's where strangers name what to see."""
    return False if serving.public() else None


@contextmanager
def _telling(repo: str) -> Generator[None]:
    """Turn what goes wrong between here and the Hub into UserErrors: all of it, since nobody sees a thread die."""
    from huggingface_hub import errors

    try:
        yield
    except (UserError, _Stopped):
        raise
    except Exception as error:
        hidden = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        raise UserError(_sentence(hidden or error, repo)) from error


def _sentence(error: BaseException, repo: str) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    match error:
        case errors.OfflineModeIsEnabled():
            return (
                f"{repo} is not all on this machine, and HF_HUB_OFFLINE keeps it from the network; unset that "
                "and try again."
            )
        case errors.HFValidationError():
            return f"{repo} is no repository on the Hugging Face Hub; those are called owner/name."
        case errors.GatedRepoError():
            return f"{repo} is gated; accept its terms at {page}, log in with `hf auth login` and try again."
        case errors.RevisionNotFoundError():
            return f"{repo} has no such revision; its branches and tags are listed at {page}/tree/main."
        case errors.RepositoryNotFoundError():
            return (
                f"There is no model {repo} on the Hugging Face Hub, or it is private; check its name, or log in "
                "with `hf auth login`."
            )
        case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
            return f"The Hugging Face Hub refuses {repo}; log in with `hf auth login` as someone who may read it."
        case errors.HfHubHTTPError(response=response) if response.status_code == 429:
            return (
                f"The Hugging Face Hub has had too many requests from here to give {repo} now; try again in a few "
                "minutes, or log in with `hf auth login`, which allows more: files that have come are kept."
            )
        case errors.HfHubHTTPError(response=response):
            return (
                f"The Hugging Face Hub has trouble with {repo} (error {response.status_code}); try again in a "
                "few minutes: files that have come are kept."
            )
        case errors.HTTPError():
            return (
                f"The Hugging Face Hub cannot be reached, or the line broke ({type(error).__name__}); check the "
                "network and try again: files that have come are kept."
            )
        case OSError(errno=int()):
            return f"{repo} cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror or error}); look there."
        case ValueError():
            return f"{constants.ENDPOINT} does not answer as the Hub does; a proxy or a login page may be in between."
    told = " ".join(str(error).split())[: limits.MAX_TOLD_CHARS] or type(error).__name__
    return (  # hf_xet's errors are RuntimeErrors, or OSErrors without a number
        f"{repo} cannot be downloaded ({told}); check the network and the room on the disk, and try again: files that "
        "have come are kept. HF_HUB_DISABLE_XET=1 downloads them in the older way."
    )
