"""The Hub, against a small one on this machine: what a repository holds, fetching, and which files are a LoRA."""

import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from iteris_sd import hub, limits
from iteris_sd.errors import UserError
from iteris_sd.hub import Listing, LoraId
from tests.fake_hub import PIECE, FakeHub

Usage = namedtuple("Usage", "total used free")
BIG = bytes(range(256)) * (80 * PIECE // 256)  # 1.3 MB
MODEL = {
    "model_index.json": b"{}",
    "unet/model.safetensors": BIG,
    "tokenizer/a ü.txt": b"a b\n" * 99,
    "tokenizer/empty.txt": b"",
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub, a cache of its own and somebody who is logged in."""
    with FakeHub({"us/model": dict(MODEL)}).running() as fake:
        fake.stand_in(monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr(hub, "_PATIENCE", 1.0)
        yield fake


def fetched(
    repo: str = "us/model", names: tuple[str, ...] = tuple(MODEL)
) -> tuple[Path, list[tuple[int, int]]]:
    """Fetch to the end: the snapshot and all that was yielded."""
    return drained(hub.fetch(repo, names, hub.listing(repo).revision))


def drained(work: Generator[tuple[int, int], None, Path]) -> tuple[Path, list[tuple[int, int]]]:
    """Run a download to its end."""
    steps = []
    while True:
        try:
            steps.append(next(work))
        except StopIteration as stop:
            return stop.value, steps


def begun(least: int) -> Generator[tuple[int, int], None, Path]:
    """A download of the model that has got `least` bytes."""
    work = hub.fetch("us/model", tuple(MODEL), hub.listing("us/model").revision)
    while next(work)[0] < least:
        pass
    return work


def lora(fake: FakeHub, *names: str, given: str = "us/lora") -> list[str]:
    """Which files are taken of a repository with these."""
    fake.repos["us/lora"] = {name: name.encode() for name in names}
    wanted = hub.parse(given)
    assert wanted is not None
    return hub.lora_files(wanted)[1]


# What a repository holds


def test_a_listing_has_sizes_and_the_commit(fake: FakeHub) -> None:
    found = hub.listing("us/model")
    assert found.files == {name: len(data) for name, data in MODEL.items()}
    assert found.revision == fake.commit("us/model") == hub.listing("us/model", "v1").revision


@pytest.mark.parametrize(
    "repo, revision, told",
    [
        ("us/nothing", None, "There is no model us/nothing on the Hugging Face Hub, or it is private"),
        ("us/model", "v2", "us/model has no such revision"),
        ("../../etc", None, "is no repository"),
    ],
)
def test_what_is_not_there_is_told(fake: FakeHub, repo: str, revision: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        hub.listing(repo, revision)


@pytest.mark.parametrize(
    "down, told", [(503, r"trouble with us/model \(error 503\); try again"), (401, "hf auth login")]
)
def test_errors_of_the_server_are_told(fake: FakeHub, down: int, told: str) -> None:
    fake.down = down
    with pytest.raises(UserError, match=told):
        hub.listing("us/model")


def test_a_login_page_is_told(fake: FakeHub) -> None:
    fake.nonsense = True
    with pytest.raises(UserError, match="does not answer as the Hub does"):
        hub.listing("us/model")


def test_no_network_is_told(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached.*check the network"):
        hub.listing("us/model")


def test_working_offline_is_told(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE keeps it from the network; unset"):
        hub.listing("us/model")
    assert not fake.asked


# Fetching


def test_files_are_fetched_into_the_usual_cache(fake: FakeHub) -> None:
    folder, steps = fetched()
    assert {n: (folder / n).read_bytes() for n in MODEL} == MODEL
    commit = fake.commit("us/model")
    for name in MODEL:  # the library's own functions find them there
        found = huggingface_hub.try_to_load_from_cache("us/model", name, revision=commit)
        assert found == str(folder / name)
    assert huggingface_hub.snapshot_download("us/model", revision=commit, local_files_only=True) == str(
        folder
    )
    assert steps[-1] == (sum(map(len, MODEL.values())),) * 2
    assert not list(folder.parents[1].rglob("*.incomplete"))


def test_nothing_is_fetched_twice(fake: FakeHub) -> None:
    folder, _ = fetched()
    asked = len(fake.served("/resolve/"))
    assert fetched()[0] == folder and len(fake.served("/resolve/")) == asked
    fake.repos["us/model"]["new.txt"] = (
        b"another commit"  # the same large file at another commit: linked, not fetched
    )
    assert fetched()[0] != folder and len(fake.served()) == 1


def test_progress_grows_and_ends_at_the_total(fake: FakeHub) -> None:
    fake.pause = 0.01
    steps = list(hub.fetch("us/model", tuple(MODEL), fake.commit("us/model")))
    done = [one for one, _ in steps]
    assert done == sorted(done) and len(set(done)) >= 4
    assert {total for _, total in steps} == {done[-1]}


def test_a_download_can_be_stopped_and_begun_again(fake: FakeHub) -> None:
    fake.pause = 0.05  # the whole file would take four seconds
    work = begun(0)
    since = time.perf_counter()
    work.close()
    assert time.perf_counter() - since < 3
    assert hub.cached("us/model", ["unet/model.safetensors"]) is None
    fake.pause = 0
    folder, steps = fetched()
    assert (folder / "unet/model.safetensors").read_bytes() == BIG


def test_a_silent_server_does_not_hold_up_who_stops(fake: FakeHub) -> None:
    fake.pause = 30.0
    work = begun(1)
    since = time.perf_counter()
    work.close()
    assert time.perf_counter() - since < 15


def test_a_network_that_goes_away_is_told_and_can_be_tried_again(fake: FakeHub) -> None:
    fake.cut = 0
    with pytest.raises(UserError, match="try again"):
        fetched()
    fake.cut = None
    assert (fetched()[0] / "unet/model.safetensors").read_bytes() == BIG


def test_two_downloads_of_one_file_bring_it_once(fake: FakeHub) -> None:
    fake.pause = 0.005
    found: list[bytes] = []

    def bring() -> None:
        found.append((fetched()[0] / "unet/model.safetensors").read_bytes())

    threads = [Thread(target=bring) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BIG, BIG] and len(fake.served()) == 1


def test_a_disk_without_links_holds_one_copy(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    folder, _ = fetched()
    assert {n: (folder / n).read_bytes() for n in MODEL} == MODEL
    assert not (folder / "unet/model.safetensors").is_symlink()
    assert not list((folder.parents[1] / "blobs").iterdir())


def test_the_token_stays_with_the_hub(fake: FakeHub) -> None:
    fetched()
    at_store = [one for one in fake.asked if one.path.startswith("/store/")]
    assert at_store and not any("authorization" in one.headers for one in at_store)
    others = [one for one in fake.asked if one not in at_store]
    assert all(one.headers["authorization"] == "Bearer hf_secret" for one in others)


def test_a_gated_repository_is_told(fake: FakeHub) -> None:
    fake.gated.add("us/model")
    with pytest.raises(
        UserError, match="us/model is gated; accept its terms at .*/us/model, log in with `hf auth"
    ):
        fetched()


def test_an_unknown_file_is_told(fake: FakeHub) -> None:
    with pytest.raises(UserError, match="us/model has no file vae.safetensors"):
        fetched(names=("vae.safetensors",))


def test_a_full_disk_is_told_before_anything_is_fetched(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 700_000))
    with pytest.raises(
        UserError, match="needs 1.3 MB and the disk of its cache, .*, has 700 kB free; make room"
    ):
        fetched()
    assert not fake.served()


def test_a_cache_that_cannot_be_written_to_is_told(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="us/model cannot be stored in .*file"):
        fetched()


def test_what_is_here_needs_no_room(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = fetched()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert fetched()[0] == folder


def test_what_is_cached_is_found_without_network(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = fetched(names=("model_index.json",))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.cached("us/model", ["model_index.json"]) == folder
    assert hub.cached("us/model", ["model_index.json", "unet/model.safetensors"]) is None
    assert hub.cached("us/other", []) is None
    assert hub.cached("/no/such/folder", ["model_index.json"]) is None


def test_of_several_whole_snapshots_main_comes_first(fake: FakeHub) -> None:
    old, _ = fetched()
    fake.repos["us/model"]["new.txt"] = b"another commit"
    new, _ = fetched()
    assert hub.cached("us/model", ["model_index.json"]) == new
    (old.parents[1] / "refs").mkdir()
    (old.parents[1] / "refs" / "main").write_text(old.name)
    assert hub.cached("us/model", ["model_index.json"]) == old


# Xet storage, where the Hub keeps large files: read by the Hub's own library, from a folder


@dataclass
class Report:
    """What hf_xet says of a download now and then: bytes over the network, and bytes written."""

    total_transfer_bytes_completed: int
    total_bytes_completed: int
    total_bytes: int = 1000
    total_bytes_completion_rate: float = 1.0
    total_transfer_bytes_completion_rate: float = 1.0


def reported(download: hub._Download, reports: list[Report]) -> list[int]:
    """What a download of one file after another of 500 bytes counts, told by the library's own reporter."""
    found = []
    bar = hub._counting(download, 500, 1000)
    with XetDownloadProgressReporter(
        reconstruction_desc="x", total=1000, log_level=30, tqdm_class=bar
    ) as progress:
        for report in reports:
            progress.update_progress(report, {})
            found.append(download.done)
    return found


def test_what_comes_over_xet_is_counted_once(fake: FakeHub) -> None:
    download = hub._Download(Listing("us/model", "v1", {"a": 500, "x": 1000}), ["a", "x"], None)
    # The network is ahead of what is written, and brings a little more than the file.
    assert reported(download, [Report(250, 0), Report(500, 500), Report(1003, 600), Report(1003, 1000)]) == [
        750,
        1000,
        1500,
        1500,
    ]


def test_xet_s_own_thread_does_not_hear_of_a_stop(fake: FakeHub) -> None:
    """It would print a traceback and go on; only the thread of the download itself is ended."""
    download = hub._Download(Listing("us/model", "v1", {"x": 1000}), ["x"], None)
    download.stopped = True
    assert reported(download, [Report(250, 250)]) == [750]
    download.start()
    download.join(5)
    assert not download.is_alive() and download.problem is None and not fake.asked


def test_files_in_xet_storage_are_fetched(fake: FakeHub, tmp_path: Path) -> None:
    fake.xet = tmp_path / "xet"
    folder, steps = fetched()
    assert {n: (folder / n).read_bytes() for n in MODEL} == MODEL
    assert not fake.served()
    total = sum(map(len, MODEL.values()))
    assert steps[-1] == (total, total) and all(done <= total for done, _ in steps)


def test_errors_of_xet_are_told_and_can_be_tried_again(fake: FakeHub, tmp_path: Path) -> None:
    fake.xet = tmp_path / "xet"
    fake.stored_by_xet(BIG)
    shutil.move(tmp_path / "xet", tmp_path / "away")
    fake.stored_by_xet = lambda data: "0" * 64  # type: ignore[method-assign]  # a file that is not there
    with pytest.raises(
        UserError, match=r"us/model cannot be downloaded \(.+\); .*try again.*HF_HUB_DISABLE_XET=1"
    ):
        fetched()
    del fake.stored_by_xet
    shutil.move(tmp_path / "away", tmp_path / "xet")
    assert (fetched()[0] / "unet/model.safetensors").read_bytes() == BIG


@pytest.mark.parametrize(
    "error, told",
    [
        (
            RuntimeError("Data processing error: CAS service error"),
            "Data processing error: CAS service error",
        ),
        (PermissionError("no\n  more"), r"\(no more\)"),
        (MemoryError(), r"\(MemoryError\)"),
    ],
)
def test_whatever_befalls_a_download_is_told(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(UserError, match=f"us/model cannot be downloaded .*{told}.*try again"):
        fetched()


def test_a_file_that_has_not_come_is_told(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: "")
    with pytest.raises(UserError, match="us/model has not come whole: model_index.json is not in"):
        fetched()


def test_files_can_go_into_a_cache_of_ones_own(fake: FakeHub, tmp_path: Path) -> None:
    revision = hub.listing("us/model").revision
    folder, _ = drained(hub.fetch("us/model", ["model_index.json"], revision, tmp_path / "own"))
    assert folder.is_relative_to(tmp_path / "own") and (folder / "model_index.json").read_bytes() == b"{}"
    assert hub.snapshots("us/model") == [] and not (tmp_path / "cache" / "models--us--model").exists()


# LoRAs by their ids


@pytest.mark.parametrize(
    "text, expected",
    [
        ("us/lora", LoraId("us/lora")),
        (" us/lo.ra-1_x ", LoraId("us/lo.ra-1_x")),
        ("us/lora:a b.safetensors", LoraId("us/lora", "a b.safetensors")),
        ("us/lora:unet/peft@refs/pr/1", LoraId("us/lora", "unet/peft", "refs/pr/1")),
        ("us/lora@v1.0", LoraId("us/lora", None, "v1.0")),
    ],
)
def test_ids_are_read_and_written(text: str, expected: LoraId) -> None:
    assert hub.parse(text) == expected
    assert str(expected) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lora",
        "a/b/c",
        "../lora",
        "./lora",
        "/us/lora",
        "us/lora.git",
        "us/lo--ra",
        "us/lora:",
        "us/lora@",
        "us/lora:../x.safetensors",
        "us/lora:/x.safetensors",
        "us/lora:a//b.safetensors",
        "us/lora:a/./b.safetensors",
        "us/lora:a\\b.safetensors",
        "us/lora:a\nb.safetensors",
        "us/lora@..",
        "us/lora@a/../b",
        "us/löra",
        "C:\\loras\\x.safetensors",
        "https://huggingface.co/us/lora",
    ],
)
def test_other_texts_are_no_ids(text: str) -> None:
    assert hub.parse(text) is None


@pytest.mark.parametrize(
    "given, names, taken",
    [
        (
            "us/lora",
            ["pytorch_lora_weights.safetensors", "x.safetensors"],
            ["pytorch_lora_weights.safetensors"],
        ),
        (
            "us/lora",
            ["adapter_config.json", "adapter_model.safetensors", "x.safetensors"],
            ["adapter_model.safetensors", "adapter_config.json"],
        ),
        ("us/lora", ["README.md", "mine.safetensors", "old/x.safetensors"], ["mine.safetensors"]),
        (
            "us/lora",
            ["mine.safetensors", "mine_emb.safetensors"],
            ["mine.safetensors", "mine_emb.safetensors"],
        ),
        (
            "us/lora",
            [
                "learned_embeds-100.safetensors",
                "pytorch_lora_weights.safetensors",
                "embeddings.safetensors",
                "old/a_emb.safetensors",
            ],
            [
                "pytorch_lora_weights.safetensors",
                "learned_embeds-100.safetensors",
                "embeddings.safetensors",
            ],
        ),
        ("us/lora:b.safetensors", ["a.safetensors", "b.safetensors"], ["b.safetensors"]),
        (
            "us/lora:old/a.safetensors@v1",
            ["old/a.safetensors", "old/a_emb.safetensors", "b_emb.safetensors"],
            ["old/a.safetensors", "old/a_emb.safetensors"],
        ),
        (
            "us/lora:p/unet",
            ["p/unet/adapter_config.json", "p/unet/adapter_model.safetensors", "x.safetensors"],
            ["p/unet/adapter_model.safetensors", "p/unet/adapter_config.json"],
        ),
    ],
)
def test_the_files_of_a_lora_are_found(fake: FakeHub, given: str, names: list[str], taken: list[str]) -> None:
    assert lora(fake, *names, given=given) == taken


@pytest.mark.parametrize(
    "given, names, told",
    [
        (
            "us/lora@v1",
            [f"{i}.safetensors" for i in range(12)],
            r"0.safetensors \(13 bytes\), .* and 2 more; name one, as us/lora:0.safetensors@v1\.",
        ),
        (
            "us/lora",
            ["unet/x.safetensors"],
            r"It holds unet/x.safetensors \(18 bytes\); name one, as us/lora:unet/x",
        ),
        (
            "us/lora",
            ["a.bin", "b.ckpt"],
            "us/lora has a.bin .*pickle can run any code.*ask its author.*convert",
        ),
        ("us/lora:a.pt", ["a.pt", "b.safetensors"], "us/lora has a.pt .*pickle"),
        ("us/lora:p", ["p/adapter_config.json", "p/adapter_model.bin"], "p/adapter_model.bin .*pickle"),
        ("us/lora:x.png", ["x.png"], "x.png of us/lora is no LoRA file"),
        (
            "us/lora:b.safetensors",
            ["a.safetensors"],
            r"has no b.safetensors; it holds a.safetensors \(13 bytes\)",
        ),
        ("us/lora", ["README.md"], "holds no LoRA: there is no .safetensors file in it"),
    ],
)
def test_where_no_lora_can_be_taken_it_is_told_why(
    fake: FakeHub, given: str, names: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        lora(fake, *names, given=given)


def test_a_file_that_is_too_large_is_refused_before_it_is_fetched(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.repos["us/lora"] = {"x.safetensors": bytes(300_000)}
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 200_000)
    with pytest.raises(UserError, match="x.safetensors of us/lora has 300 kB and at most 200 kB are read"):
        hub.lora_files(LoraId("us/lora"))
    assert not fake.served("/resolve/")


def test_a_smaller_bound_may_be_set(fake: FakeHub) -> None:
    fake.repos["us/lora"] = {"x.safetensors": bytes(3000)}
    with pytest.raises(
        UserError, match="x.safetensors of us/lora has 3.0 kB and at most 2.0 kB are read here"
    ):
        for _ in hub.fetch_lora(LoraId("us/lora"), most=2000):
            pass
    assert hub.lora_files(LoraId("us/lora"), 3000)[1] == ["x.safetensors"] and not fake.served("/resolve/")


def test_more_tokens_than_a_concept_has_are_refused_before_they_come(fake: FakeHub) -> None:
    names = [f"{k}_emb.safetensors" for k in range(limits.MAX_EMBEDDINGS + 1)]
    assert len(lora(fake, "x.safetensors", *names[1:])) == limits.MAX_EMBEDDINGS + 1
    with pytest.raises(
        UserError, match="us/lora holds 33 files of learned tokens beside x.safetensors, and a"
    ):
        lora(fake, "x.safetensors", *names)


def test_learned_tokens_that_are_too_large_are_left(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_EMBEDDING_BYTES", 10)
    assert lora(fake, "x.safetensors", "x_emb.safetensors") == ["x.safetensors"]


def test_it_costs_nothing_to_import() -> None:
    code = "import sys, iteris_sd.hub; sys.exit(bool({'torch', 'huggingface_hub'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "size, told",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (340_000, "340 kB"),
        (999_999, "1.0 MB"),
        (2_742_000_000, "2.7 GB"),
        (17 * 10**9, "17 GB"),
        (3 * 10**12, "3.0 TB"),
    ],
)
def test_sizes_are_readable(size: int, told: str) -> None:
    assert hub.readable(size) == told
