"""What comes from the Hugging Face Hub: what a repository holds, what of it is here already, and fetching the rest.

Files go into the Hub's usual cache. Since version 1.18 huggingface_hub starts an interrupted file anew, so they are
streamed here, over plain HTTP, into a partial file that the next try goes on with.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event

from iteris_sd import limits
from iteris_sd.errors import UserError

_TICK = 0.1  # seconds between two reports
_PATIENCE = 10.0  # seconds that a server may be silent
_LISTED = 10  # files that a message names

_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_USUAL = ("pytorch_lora_weights.safetensors", _PEFT_WEIGHTS)  # diffusers' name first
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


@dataclass(frozen=True)
class _File:
    """`etag` is what the cache calls the content: the SHA-256 of large files, git's own hash of others."""

    size: int
    etag: str


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
    commit, files = _look(repo, revision)
    return Listing(repo, commit, {name: file.size for name, file in files.items()})


def cached(repo: str, required: Sequence[str]) -> Path | None:
    """The cached snapshot that holds all of `required`, without any network; None when no snapshot does.

    Of several, the one that ``main`` was when last looked at, else the newest.
    """
    home = _home(repo)
    main = home / "refs" / "main"
    current = main.read_text().strip() if main.is_file() else ""
    snapshots = sorted(
        home.glob("snapshots/*"), key=lambda s: (s.name == current, s.stat().st_mtime), reverse=True
    )
    return next((s for s in snapshots if all((s / name).is_file() for name in required)), None)


def fetch(repo: str, names: Sequence[str], revision: str) -> Generator[tuple[int, int], None, Path]:
    """Download the files `names` at `revision` into the cache; yield (bytes done, bytes in all), return the snapshot.

    Yields at least four times a second. Closing it stops the download; what has arrived is gone on with next time.
    Raises UserError when they cannot be had or do not fit on the disk.
    """
    commit, there = _look(repo, revision)
    if unknown := [name for name in names if name not in there]:
        raise UserError(f"{repo} has no file {unknown[0]} at {revision}.")
    download = _Download(repo, commit, {name: there[name] for name in names})
    download.check_room()
    pool = ThreadPoolExecutor(1, "hub")
    work = pool.submit(download.run)
    try:
        while not work.done():
            yield download.done, download.total
            wait([work], timeout=_TICK)
        work.result()
        yield download.total, download.total
    finally:
        download.stop.set()
        pool.shutdown(wait=False)
        wait([work], timeout=1)  # a silent server may hold it longer, but it writes nothing any more
    return download.folder


class _Stopped(Exception):
    """Nobody waits for this download any more."""


class _Download:
    """Files on their way into the cache, in a thread of their own. `done`, `total`: bytes."""

    def __init__(self, repo: str, revision: str, files: Mapping[str, _File]) -> None:
        self.repo, self.revision, self.files = repo, revision, files
        self.home = _home(repo)
        self.folder = self.home / "snapshots" / revision
        self.done, self.total = 0, sum(file.size for file in files.values())
        self.stop = Event()

    def check_room(self) -> None:
        """Raise UserError when the disk has less room than what is yet to come takes."""
        needed = self.total - sum(min(file.size, self._here(n, file)) for n, file in self.files.items())
        place = next(p for p in self.home.parents if p.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"Fetching {self.repo} needs {readable(needed)} and the disk of {self.home.parent} has "
                f"{readable(free)} free; make room, or set HF_HUB_CACHE to a folder on a larger disk."
            )

    def run(self) -> None:
        """Fetch all files. Raises UserError, or _Stopped."""
        with _telling(self.repo):
            before = 0
            for name, file in self.files.items():
                if not (self.folder / name).is_file():
                    self._get(name, file, before)
                before += file.size
                self.done = before

    def _get(self, name: str, file: _File, before: int) -> None:
        from huggingface_hub import hf_hub_download

        blob, partial = self._blob(file), self._partial(file)
        lock = self.home.parent / ".locks" / self.home.name / f"{file.etag}.lock"  # the library's own
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            self._wait_for(lock, held)
            if not (blob.is_file() or (self.folder / name).is_file()):
                self._stream(name, file, before)
                _check(name, partial, file)
                partial.replace(blob)
        found = hf_hub_download(self.repo, name, revision=self.revision, token=_token())
        link = Path(found)  # finds the blob and links it
        if not link.is_symlink():  # this disk knows no links, and the file was copied
            blob.unlink(missing_ok=True)

    def _stream(self, name: str, file: _File, before: int) -> None:
        """Bring what the partial file lacks. A broken line is taken up again as long as each try brings something."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        partial = self._partial(file)
        while True:
            had = _size(partial)
            try:
                return self._append(name, file, before)
            except HfHubHTTPError:
                raise
            except HTTPError:
                if _size(partial) <= had:
                    raise
            if self.stop.wait(_TICK):
                raise _Stopped

    def _append(self, name: str, file: _File, before: int) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        with self._partial(file).open("ab") as partial:
            have = partial.tell()
            if have >= file.size:
                return
            url = hf_hub_url(self.repo, name, revision=self.revision)
            headers = {
                **build_hf_headers(token=_token()),
                "Accept-Encoding": "identity",
                "Range": f"bytes={have}-",
            }
            with get_session().stream("GET", url, headers=headers, timeout=_PATIENCE) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:  # ranges are not served here: this is the whole file
                    partial.truncate(0)
                    have = 0
                for piece in response.iter_bytes():
                    if self.stop.is_set():
                        raise _Stopped
                    partial.write(piece)
                    have += len(piece)
                    self.done = max(self.done, before + min(have, file.size))

    def _wait_for(self, lock: Path, held: ExitStack) -> None:
        """Wait until no other download, of this process or another, is bringing the same file."""
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock

        while not self.stop.is_set():
            try:
                held.enter_context(WeakFileLock(lock, timeout=_TICK))
                return
            except Timeout:
                continue
        raise _Stopped

    def _here(self, name: str, file: _File) -> int:
        """Bytes of a file that need not come any more."""
        whole = (self.folder / name).is_file() or self._blob(file).is_file()
        return file.size if whole else _size(self._partial(file))

    def _blob(self, file: _File) -> Path:
        return self.home / "blobs" / file.etag

    def _partial(self, file: _File) -> Path:
        # Not the library's own name: what old versions left there may have holes.
        return self.home / "blobs" / f"{file.etag}.resumable.incomplete"


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


def lora_files(wanted: LoraId) -> tuple[Listing, list[str]]:
    """The repository of a LoRA and the files to fetch: the LoRA itself first, then what belongs to it.

    Raises UserError when there is no LoRA, several to choose from, only pickles, or one that is too large.
    """
    found = listing(wanted.repo, wanted.revision)
    name = _named(wanted.file, wanted, found.files) if wanted.file else _usual(wanted, found.files)
    folder = name[: name.rfind("/") + 1]
    config = f"{folder}{_PEFT_CONFIG}"
    names = [name, config] if name == folder + _PEFT_WEIGHTS and config in found.files else [name]
    for one, bound in zip(names, (limits.MAX_FILE_BYTES, limits.MAX_CONFIG_BYTES), strict=False):
        if found.files[one] > bound:
            raise UserError(
                f"{one} of {wanted.repo} has {readable(found.files[one])} and at most {readable(bound)} are read; "
                "it is hardly a LoRA."
            )
    tokens = [
        one
        for one, size in found.files.items()
        if one != name and _is_token(one, folder) and size <= limits.MAX_EMBEDDING_BYTES
    ]
    return found, [*names, *tokens[: limits.MAX_TOKENS]]


def _named(file: str, wanted: LoraId, files: Mapping[str, int]) -> str:
    """The file that was asked for, or the weights in the folder that was."""
    if file in files and file.endswith(".safetensors"):
        return file
    if (weights := f"{file}/{_PEFT_WEIGHTS}") in files:
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


def _home(repo: str) -> Path:
    """Where the cache keeps a repository, as the Hub's documentation has it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / "--".join(("models", *repo.split("/")))


def _look(repo: str, revision: str | None) -> tuple[str, dict[str, _File]]:
    """The commit that a revision stands for, and its files."""
    from huggingface_hub import HfApi

    with _telling(repo):
        info = HfApi(token=_token()).model_info(
            repo, revision=revision, files_metadata=True, timeout=_PATIENCE
        )
    files = {
        one.rfilename: _File(one.size or 0, one.lfs.sha256 if one.lfs else one.blob_id or "")
        for one in info.siblings or ()
    }
    return info.sha or "", files


def _token() -> bool | None:
    """Whose eyes to look with: this machine's user's, but on a public Space nobody's, for visitors name what to see."""
    return False if "SPACE_ID" in os.environ else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(name: str, path: Path, file: _File) -> None:
    """Raise UserError, and throw the file away, when it is not what the Hub promised."""
    sound = _size(path) == file.size
    if sound and len(file.etag) == 64:
        with path.open("rb") as content:
            sound = hashlib.file_digest(content, "sha256").hexdigest() == file.etag
    if not sound:
        path.unlink()
        raise UserError(f"{name} arrived damaged and was thrown away; try again.")


@contextmanager
def _telling(repo: str) -> Generator[None]:
    """Turn what goes wrong between here and the Hub into UserErrors."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except (errors.HTTPError, OSError, ValueError) as error:
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
        case errors.HfHubHTTPError(response=response):
            return (
                f"The Hugging Face Hub has trouble with {repo} (error {response.status_code}); try again in a "
                "few minutes: what has arrived is kept."
            )
        case errors.HTTPError():
            return (
                f"The Hugging Face Hub cannot be reached, or the line broke ({type(error).__name__}); check the "
                "network and try again: what has arrived is kept."
            )
        case OSError():
            return f"{repo} cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror or error}); look there."
    return f"{constants.ENDPOINT} does not answer as the Hub does; a proxy or a login page may be in between."
