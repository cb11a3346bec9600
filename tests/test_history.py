"""Compositions that were made: kept whole or not at all, newest first, and only so many of them."""

import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from iteris_sd import concepts, history, kept, limits
from iteris_sd.errors import UserError
from iteris_sd.history import Entry, History
from iteris_sd.recipe import Recipe

SCORES = {"scorer": "nobody", "pictures": [{"file": "a.png", "scores": {"text": None}}]}
ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}", re.ASCII)


def asked(**changes: Any) -> Recipe:
    pair = {"concepts": [{"name": "dog"}, {"name": "barn"}], "prompt": "a {0} next\nto a {1}"}
    return Recipe.of({**pair, **changes})


@pytest.fixture
def made(tmp_path: Path) -> list[Path]:
    """The files of a composition, in a folder of their own."""
    folder = tmp_path / "run"
    folder.mkdir()
    paths = [folder / name for name in ("iteris_seed1.png", "base_seed0.png", "grid.png", "pictures.zip")]
    for number, path in enumerate(paths[:3]):
        Image.new("RGB", (400 * (number + 1), 200), (80 * number, 0, 0)).save(path)
    paths[3].write_bytes(b"PK")
    return paths


@pytest.fixture
def past(tmp_path: Path) -> History:
    return History(tmp_path / "data" / "history")


def left(past: History) -> list[str]:
    """All that is in the folder, hidden things too."""
    return sorted(p.name for p in past.folder.iterdir()) if past.folder.exists() else []


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(entry: Entry, name: str, content: str | bytes | None) -> None:
    path = entry.folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


# Keeping


def test_a_composition_is_kept_with_all_it_has(past: History, made: list[Path]) -> None:
    before = datetime.now(UTC)
    entry = past.keep(asked(), SCORES, made, "done")
    assert past.entries() == [entry] == [past.find(entry.id)]
    assert before <= entry.made <= datetime.now(UTC) and entry.made.utcoffset() == timedelta(0)
    assert ID.fullmatch(entry.id) and entry.id.startswith(f"{entry.made:%Y%m%d-%H%M%S}-")
    assert (entry.recipe(), entry.scores(), entry.phase) == (asked(), SCORES, "done")
    assert [p.name for p in entry.pictures] == ["iteris_seed1.png", "base_seed0.png"]
    assert entry.title == "a dog next to a barn · dog + barn · base, linear, iteris · 2 pictures"
    words = json.loads((entry.folder / "entry.json").read_text())
    assert (words["id"], datetime.fromisoformat(words["made"])) == (entry.id, entry.made)
    for path in made:
        assert (entry.folder / path.name).read_bytes() == path.read_bytes()
    assert left(past) == [entry.id] and past.broken == {}


def test_it_stays_when_the_files_go(past: History, made: list[Path]) -> None:
    entry = past.keep(asked(), None, made, "done")
    shutil.rmtree(made[0].parent)
    for path in entry.pictures:
        Image.open(path).load()


def test_what_has_no_pictures_is_kept_too(past: History) -> None:
    entry = past.keep(asked(), None, [], "stopped")
    assert (entry.pictures, entry.grid, entry.thumbnail, entry.scores()) == ((), None, None, None)
    assert entry.phase == "stopped" and entry.title.endswith(" · 0 pictures")
    assert past.find(entry.id) == entry


def test_the_thumbnail_is_of_the_grid_or_the_first_picture_that_opens(
    past: History, made: list[Path]
) -> None:
    def small(files: list[Path]) -> Image.Image:
        thumbnail = past.keep(asked(), None, files, "done").thumbnail
        assert thumbnail is not None and thumbnail.name == "thumbnail.webp"
        with Image.open(thumbnail) as picture:
            assert picture.format == "WEBP" and max(picture.size) == limits.MAX_THUMBNAIL_SIDE
            return picture.convert("RGB")

    assert small(made).size == (320, 53)
    assert small(made[:2]).size == (320, 160)
    made[2].write_bytes(b"no picture")
    assert small(made).size == (320, 160)
    made[0].write_bytes(b"no picture")
    assert small(made).size == (320, 80)


def test_files_are_copied_where_they_cannot_be_linked(
    past: History, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_disk(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    linked = past.keep(asked(), None, made, "done")
    monkeypatch.setattr(os, "link", another_disk)
    copied = past.keep(asked(), None, made, "done")
    assert linked.pictures[0].samefile(made[0]) and not copied.pictures[0].samefile(made[0])
    assert copied.pictures[0].read_bytes() == made[0].read_bytes()


def test_a_link_s_target_is_kept(past: History, made: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link.png"
    link.symlink_to(made[0])
    (path,) = past.keep(asked(), None, [link], "done").pictures
    assert path.name == "link.png" and not path.is_symlink()


def test_our_own_files_are_written_from_the_values(past: History, tmp_path: Path) -> None:
    given = [tmp_path / name for name in ("recipe.json", "scores.json", "entry.json", "thumbnail.webp")]
    for path in given:
        path.write_text("given")
    entry = past.keep(asked(), SCORES, given, "done")
    assert (entry.recipe(), entry.scores(), entry.thumbnail) == (asked(), SCORES, None)
    assert [path.read_text() for path in given] == ["given"] * 4


def test_the_title_stays_a_line(past: History) -> None:
    uses = [{"name": "/somewhere/my_dog.safetensors"}, {"name": "someone/" + "x" * 999}]
    entry = past.keep(asked(concepts=uses, prompt="a {0} and " + "y" * 900), None, [], "done")
    assert entry.title.startswith("a my_dog and yyy") and " · my_dog + xxx" in entry.title
    assert "\n" not in entry.title and len(entry.title) < 2 * limits.MAX_TITLE_CHARS + 60
    assert past.find(entry.id) == entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files + [files[0].parent / "none.png"], "there is no file .*none.png"),
        (lambda files: files + [files[0].parent], "there is no file .*run"),
        (lambda files: files + files[:1], "Two files are called iteris_seed1.png"),
    ],
)
def test_files_that_cannot_be_kept(
    past: History, made: list[Path], change: Callable[[list[Path]], list[Path]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        past.keep(asked(), None, change(made), "done")
    with pytest.raises(UserError, match="is done or stopped when it is kept, not 'failed'"):
        past.keep(asked(), None, made, "failed")
    assert left(past) == []


@pytest.mark.parametrize("step", ["_put", "_small", "_write_json"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_fails(
    past: History, made: list[Path], monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise failure

    entry = past.keep(asked(), SCORES, made, "done")
    monkeypatch.setattr(history, step, fail)
    told = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(told):
        past.keep(asked(), SCORES, made, "done")
    assert left(past) == [entry.id] and past.entries() == [entry]


def test_a_full_disk_is_told(past: History, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"Nothing can be written into .*history \(No space left on device\)"):
        past.keep(asked(), None, made, "done")
    assert left(past) == []


def test_a_file_in_the_way_is_told(past: History, made: list[Path]) -> None:
    past.folder.parent.mkdir()
    past.folder.touch()
    with pytest.raises(UserError, match="Nothing can be written into .*history"):
        past.keep(asked(), None, made, "done")
    assert past.entries() == [] and past.broken == {}
    assert past.folder.read_bytes() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_nothing_may_be_written_into_is_told(past: History, made: list[Path]) -> None:
    entry = past.keep(asked(), None, made, "done")
    past.folder.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Nothing can be written into .*Permission denied"):
            past.keep(asked(), None, made, "done")
        with pytest.raises(UserError, match="cannot be removed .Permission denied"):
            past.delete(entry.id)
        assert past.entries() == [entry]
    finally:
        past.folder.chmod(0o700)


def test_leftovers_of_a_crash_are_cleared_when_they_are_old(past: History, made: list[Path]) -> None:
    now = time.time()
    for name, age in ((".unfinished-old", limits.MAX_UNFINISHED_SECONDS + 60), (".unfinished-new", 60)):
        (past.folder / name / "made").mkdir(parents=True)
        (past.folder / name / "made" / "entry.json").write_text("{")
        os.utime(past.folder / name, (now - age, now - age))
    assert past.entries() == [] and past.broken == {}
    entry = past.keep(asked(), None, made, "done")
    assert left(past) == [".unfinished-new", entry.id]


def test_the_usual_one_lies_beside_kept_concepts() -> None:
    assert History.usual().folder == kept.Kept.usual().folder.with_name("history")
    assert History.usual().folder.parent == Path(os.environ["ITERIS_SD_DATA"])


# Order and bounds


def test_the_newest_comes_first(past: History) -> None:
    entries = [past.keep(asked(), None, [], "done") for _ in range(20)]
    assert past.entries() == entries[::-1]
    assert sorted(e.id for e in entries) == [e.id for e in entries]


def test_an_id_that_is_taken_is_not_used_again(past: History, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = iter([7, 7, 7, 8])
    moment = datetime(2026, 11, 25, 17, 14, 0, 123, UTC)

    class Clock:
        @staticmethod
        def now(_: Any) -> datetime:
            return moment

    monkeypatch.setattr(history, "datetime", Clock)
    monkeypatch.setattr(history.secrets, "randbelow", lambda _: next(digits))
    ids = [past.keep(asked(), None, [], "done").id for _ in range(2)]
    assert ids == ["20261125-171400-0007b7", "20261125-171400-0007b8"]
    assert [e.id for e in past.entries()] == ids[::-1]


def test_the_oldest_go_where_there_are_too_many(past: History, made: list[Path]) -> None:
    few = History(past.folder, most=3)
    entries = [few.keep(asked(), None, made[:1], "done") for _ in range(5)]
    assert few.entries() == entries[:1:-1]
    assert left(few) == [e.id for e in entries[2:]]


def test_the_oldest_go_where_they_take_too_much_room(past: History, made: list[Path]) -> None:
    made[3].write_bytes(bytes(100_000))
    small = History(past.folder, most_bytes=250_000)
    entries = [small.keep(asked(), None, made, "done") for _ in range(4)]
    assert small.entries() == entries[:1:-1]
    made[3].unlink()  # what is linked is not to be written into
    made[3].write_bytes(bytes(300_000))
    alone = small.keep(asked(), None, made, "done")
    assert small.entries() == [alone]


def test_broken_entries_take_room_too(past: History) -> None:
    few = History(past.folder, most=2)
    broken(few.keep(asked(), None, [], "done"), "entry.json", None)
    entries = [few.keep(asked(), None, [], "done") for _ in range(2)]
    assert few.entries() == entries[::-1] and few.broken == {}


def together(*works: Callable[[], object]) -> list[BaseException]:
    """Run these at once; returns what they raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_several_may_keep_at_once(past: History, made: list[Path]) -> None:
    found: list[Entry] = []

    def keep() -> None:
        for _ in range(15):
            found.append(past.keep(asked(), SCORES, made, "done"))

    assert together(keep, keep, keep) == []
    assert len({e.id for e in found}) == 45
    assert past.entries() == sorted(found, key=lambda e: e.id, reverse=True)
    assert left(past) == sorted(e.id for e in found)


def test_entries_may_vanish_while_others_look(past: History, made: list[Path]) -> None:
    few = History(past.folder, most=2)

    def keep() -> None:
        for _ in range(20):
            few.keep(asked(), None, made, "done")

    def look() -> None:
        for _ in range(100):
            assert few.broken == {}
            for entry in few.entries():
                assert entry.title.endswith("2 pictures")

    assert together(keep, keep, look) == []
    assert len(few.entries()) <= 2 and not [n for n in left(few) if n.startswith(".")]


def test_one_that_is_removed_twice_is_told_once(past: History, made: list[Path]) -> None:
    for _ in range(10):
        entry = past.keep(asked(), None, made, "done")
        raised = together(*[lambda: past.delete(entry.id)] * 3)  # noqa: B023
        assert len(raised) == 2 and all(isinstance(error, UserError) for error in raised)
    assert left(past) == []


# Finding, deleting, and what is broken


@pytest.mark.parametrize(
    "id",
    [
        *("", ".", "..", "../run", "../../etc/passwd", "/etc", "20261125-171400-3fa9c2"),
        *("20261125-171400-3fa9c2/..", "20261125-171400-3fa9c2\n", "20261125-171400-3FA9C2"),
        *("２０２６１１２５-171400-3fa9c2", ".unfinished-1", "a\x00b", "x" * 5000),
    ],
)
def test_ids_that_lead_nowhere(past: History, made: list[Path], id: str) -> None:
    entry = past.keep(asked(), None, made, "done")
    for work in (past.find, past.delete):
        with pytest.raises(UserError, match="There is no composition '.{0,60}' in the history") as told:
            work(id)
        assert len(str(told.value)) < 150
    assert past.entries() == [entry] and all(path.exists() for path in made)


def test_one_is_removed(past: History, made: list[Path]) -> None:
    first, second = (past.keep(asked(), None, made, "done") for _ in range(2))
    past.delete(first.id)
    assert past.entries() == [second] and left(past) == [second.id]
    assert all(path.exists() for path in made)
    with pytest.raises(UserError, match="There is no composition"):
        past.delete(first.id)
    with pytest.raises(UserError, match="There is no composition"):
        past.find(first.id)


def test_what_cannot_be_removed_is_told(
    past: History, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    entry = past.keep(asked(), None, made, "done")
    monkeypatch.setattr(Path, "rename", denied)
    with pytest.raises(UserError, match=rf"{entry.id} cannot be removed \(Permission denied\); remove"):
        past.delete(entry.id)
    assert past.entries() == [entry]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("", "it is not valid JSON"),
        ("{", "it is not valid JSON"),
        (b"\xff\xfe\xfd", "it is not valid JSON"),
        ("[" * 50_000, "it is not valid JSON"),
        ("[]", "entry.json holds no JSON object, but list"),
        ("{}", "in entry.json, id: field required"),
        (" " * (limits.MAX_ENTRY_BYTES + 1), "entry.json has more than 65,536 bytes"),
    ],
)
def test_broken_entries_are_left_out_and_listed(
    past: History, made: list[Path], content: str | bytes | None, reason: str
) -> None:
    bad, good = (past.keep(asked(), None, made, "done") for _ in range(2))
    broken(bad, "entry.json", content)
    assert past.entries() == [good]
    assert past.broken == {bad.id: f"The composition {bad.id} is broken: {reason}."}
    with pytest.raises(UserError, match=reason):
        past.find(bad.id)
    past.delete(bad.id)
    assert left(past) == [good.id]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"made": "2026-11-25T17:14:00"}, "in entry.json, made: input should have timezone info"),
        ({"made": "yesterday"}, "in entry.json, made: input should be a valid datetime"),
        ({"phase": "failed"}, "in entry.json, phase: input should be 'done' or 'stopped'"),
        ({"pictures": "a.png"}, "in entry.json, pictures: input should be a valid tuple"),
        ({"title": None}, "in entry.json, title: input should be a valid string"),
    ],
)
def test_words_that_are_wrong_are_told(past: History, words: dict[str, Any], reason: str) -> None:
    entry = past.keep(asked(), None, [], "done")
    told = json.loads((entry.folder / "entry.json").read_text())
    broken(entry, "entry.json", json.dumps({**told, **words}))
    assert reason in past.broken[entry.id]


def test_an_entry_reaches_no_further_than_its_folder(past: History, made: list[Path], tmp_path: Path) -> None:
    entry = past.keep(asked(), None, made, "done")
    told = json.loads((entry.folder / "entry.json").read_text())
    names = ["../../../run/grid.png", "/etc/passwd", "..", "", "a\x00.png", "none.png", "base_seed0.png"]
    broken(entry, "entry.json", json.dumps({**told, "pictures": names, "later": "a newer version's word"}))
    assert past.find(entry.id).pictures == (entry.folder / "base_seed0.png",)


def test_files_that_went_missing_are_left_out(past: History, made: list[Path]) -> None:
    entry = past.keep(asked(), SCORES, made, "done")
    for name in ("iteris_seed1.png", "grid.png", "thumbnail.webp", "scores.json"):
        (entry.folder / name).unlink()
    found = past.find(entry.id)
    assert ([p.name for p in found.pictures], found.grid, found.thumbnail) == (["base_seed0.png"], None, None)
    assert found.scores() is None


def test_strangers_in_the_folder_are_left_alone(past: History) -> None:
    entry = past.keep(asked(), None, [], "done")
    (past.folder / ".DS_Store").touch()
    (past.folder / "notes").mkdir()
    (past.folder / "20261125-171400-3fa9c2").touch()  # a file
    assert past.entries() == [entry] and past.broken == {}
    with pytest.raises(UserError, match="There is no composition"):
        past.delete("20261125-171400-3fa9c2")
    assert (past.folder / "20261125-171400-3fa9c2").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "There is no file recipe.json"),
        ("{", "recipe.json carries a broken recipe: it is not valid JSON"),
        ('{"version": 2, "anything": 1}', "The recipe is of version 2, and this program knows 1"),
        ('{"upscale": 2}', "The recipe speaks of 'upscale', which is not known here"),
        ('{"prompt": "a dog"}', "In the recipe, concepts: field required"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_told_when_it_is_asked_for(
    past: History, made: list[Path], content: str | None, reason: str
) -> None:
    entry = past.keep(asked(), None, made, "done")
    broken(entry, "recipe.json", content)
    assert past.entries() == [entry]
    with pytest.raises(UserError, match=reason):
        entry.recipe()


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 50_000, b"\xff", " " * (limits.MAX_SCORES_BYTES + 1)])
def test_scores_that_cannot_be_read_are_told(past: History, made: list[Path], content: str | bytes) -> None:
    entry = past.keep(asked(), SCORES, made, "done")
    broken(entry, "scores.json", content)
    with pytest.raises(UserError, match=f"The scores of {entry.id} cannot be read: "):
        entry.scores()


def test_a_grid_too_large_to_open_costs_only_its_thumbnail(
    past: History, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PICTURE_PIXELS", 100)
    entry = past.keep(asked(), None, made, "done")
    assert entry.thumbnail is None and entry.grid is not None
    assert concepts.limits.MAX_PICTURE_PIXELS == 100
