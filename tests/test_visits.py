"""What a visitor brings: on one's own page as much as one likes, on a public one within bounds, and gone with it."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from iteris_sd import formats, hub, limits
from iteris_sd.concepts import Concept, Library
from iteris_sd.errors import UserError
from iteris_sd.history import History
from iteris_sd.kept import Kept
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.ui import own
from iteris_sd.ui.crowd import Crowd
from iteris_sd.ui.visits import Visit
from tests.fake_hub import FakeHub

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
WORDS = {"title": "", "trigger": "", "class_noun": "", "weight": 1.0}


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Gradio puts what browsers send."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder


@pytest.fixture
def visit(tmp_path: Path, toy: Path, uploads: Path) -> Visit:
    """A visit beside another one, as `Visits` begins them."""
    folder, shown = tmp_path / "root" / "visit-1", tmp_path / "root" / "shown" / "1"
    return Visit(
        folder, shown, Library.shipped(), Kept(folder / "concepts"), History(shown / "history"), Crowd()
    )


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA file of about 9 kB."""
    path = tmp_path / "dog.safetensors"
    formats.write(path, LoRA({TO_K: LowRank(torch.ones(2, 768), torch.ones(320, 2))}), {})
    return path


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "rex.safetensors"
    formats.write_embedding(path, "<rex>", torch.ones(1, 768))
    return path


@pytest.fixture
def fake(tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with one LoRA, and an empty cache."""
    with FakeHub({"us/dog": {"dog.safetensors": lora.read_bytes()}}).running() as fake:
        fake.stand_in(monkeypatch, tmp_path / "cache")
        yield fake


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "us/space")


def ended(work: Generator[tuple[int, int], None, Concept]) -> Concept:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def from_hub(visit: Visit, *tokens: Path) -> Concept:
    return ended(visit.add_from_hub(hub.LoraId("us/dog"), WORDS, [], tokens))


def files_in(*folders: Path) -> list[str]:
    return [path.name for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_tokens_come_with_a_lora_or_later(visit: Visit, lora: Path, token: Path) -> None:
    assert visit.add([lora, token], WORDS).load().tokens.keys() == {"<rex>"}
    later = visit.add([lora], WORDS)
    assert not later.load().tokens
    assert visit.change(later.name, {"title": "Rex"}, [], [token]).title == "Rex"
    assert visit.mine()[later.name].load().tokens.keys() == {"<rex>"}
    with pytest.raises(
        UserError, match=f"Only files of learned tokens .* can be added to {later.name}; choose “A new"
    ):
        visit.change(later.name, {"title": "Max"}, [], [lora])
    assert visit.mine()[later.name].title == "Rex"


def test_what_is_chosen_is_looked_at_before_it_is_kept(
    visit: Visit, lora: Path, token: Path, tmp_path: Path
) -> None:
    found = visit.look_at([token, lora])
    assert isinstance(found, Concept) and found.title == "dog"
    assert "learned tokens; choose the concept" in str(visit.look_at([token]))
    name = visit.add([lora], WORDS).name
    assert "words of its own" in str(visit.look_at([visit.export(name)]))
    with pytest.raises(UserError, match="none.safetensors"):
        visit.look_at([tmp_path / "none.safetensors"])


def test_on_ones_own_page_the_hub_s_cache_is_used(
    visit: Visit, fake: FakeHub, token: Path, tmp_path: Path
) -> None:
    concept = from_hub(visit, token)
    assert (concept.source, concept.revision) == ("us/dog", fake.commit("us/dog"))
    assert concept.load().tokens.keys() == {"<rex>"}
    assert "dog.safetensors" in files_in(tmp_path / "cache")


@pytest.mark.usefixtures("public")
def test_what_a_public_page_downloads_goes_at_once(visit: Visit, fake: FakeHub, tmp_path: Path) -> None:
    concept = from_hub(visit)
    assert concept.load().lora and fake.served()
    assert files_in(tmp_path / "cache") == []
    assert sorted(files_in(tmp_path / "root")) == ["concept.json", "lora.safetensors"]


@pytest.mark.usefixtures("public")
def test_a_public_page_refuses_before_it_downloads(
    visit: Visit, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PUBLIC_BYTES", 5000)
    with pytest.raises(
        UserError, match="would have 9.0 kB, and a visitor of this public page can keep 5.0 kB"
    ):
        from_hub(visit)
    assert not fake.served() and not visit.mine()


@pytest.mark.parametrize(
    ("bound", "most", "told"),
    [
        ("MAX_PUBLIC_CONCEPTS", 1, "A visitor of this public page can keep 1 concepts; remove one, or run"),
        ("MAX_PUBLIC_BYTES", 15_000, "would have 18 kB, and a visitor of this public page can keep 15 kB"),
        ("MAX_PUBLIC_BYTES_IN_ALL", 15_000, "This public page is full of what its visitors brought; try again later"),
    ],
)  # fmt: skip
def test_strangers_bring_so_much_and_no_more(
    visit: Visit, lora: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int, told: str
) -> None:
    monkeypatch.setattr(limits, bound, most)
    assert [visit.add([lora], WORDS).name for _ in range(2)] == ["dog-2", "dog-3"]  # one's own page
    visit.remove("dog-3")
    monkeypatch.setenv("SPACE_ID", "us/space")
    with pytest.raises(UserError, match=told):
        visit.add([lora], WORDS)
    assert list(visit.mine()) == ["dog-2"]
    visit.remove("dog-2")
    assert visit.add([lora], WORDS).name == "dog-2"


@pytest.mark.usefixtures("public")
def test_a_zip_counts_by_what_is_in_it(visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "even.safetensors"
    formats.write(path, LoRA({TO_K: LowRank(torch.randn(64, 768), torch.ones(320, 64))}), {})
    with zipfile.ZipFile(tmp_path / "even.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, path.name)
    assert (tmp_path / "even.zip").stat().st_size < 230_000 < path.stat().st_size
    monkeypatch.setattr(limits, "MAX_PUBLIC_BYTES", 230_000)
    with pytest.raises(UserError, match="your concepts would have 279 kB"):
        visit.add([tmp_path / "even.zip"], WORDS)
    assert not visit.mine()


def zipped(file: Path) -> Path:
    with zipfile.ZipFile(file.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, file.name)
    return file.with_suffix(".zip")


@pytest.mark.usefixtures("public")
def test_an_export_counts_and_goes_with_its_concept(
    visit: Visit, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [visit.add([lora], WORDS).name for _ in range(2)]
    first = visit.export(names[0])
    second = visit.export(names[1])
    assert not first.exists() and second.is_file()  # one at a time, as the page offers them
    with monkeypatch.context() as patch:
        patch.setattr(limits, "MAX_PUBLIC_BYTES", 29_000)
        with pytest.raises(UserError, match="your concepts would have 37 kB"):
            visit.look_at([zipped(lora)])
        patch.setattr(limits, "MAX_PUBLIC_BYTES", 25_000)
        with pytest.raises(UserError, match="your concepts would have 28 kB"):
            visit.export(names[0])
    visit.export(names[0])
    visit.remove(names[0])
    assert not [name for name in files_in(tmp_path / "root") if name.endswith(".zip")]


@pytest.mark.usefixtures("public")
def test_a_file_is_as_large_as_one_may_be_wherever_it_comes_from(
    visit: Visit, fake: FakeHub, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = visit.export(visit.add([lora], WORDS).name).rename(lora.with_name("out.zip"))
    monkeypatch.setattr(limits, "MAX_PUBLIC_FILE_BYTES", 5000)
    for file in (zipped(lora), exported):
        with pytest.raises(UserError, match="it unpacks to more than .* bytes"):
            visit.add([file], WORDS)
    with pytest.raises(UserError, match="it unpacks to more than .* bytes"):
        visit.look_at([zipped(lora)])
    with pytest.raises(UserError, match="has 9.0 kB and at most 5.0 kB are read here"):
        from_hub(visit)
    assert len(visit.mine()) == 1 and not fake.served()


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("bound", ["MAX_PUBLIC_BYTES", "MAX_PUBLIC_BYTES_IN_ALL"])
def test_looking_and_changing_need_room_too(
    visit: Visit, lora: Path, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    name = visit.add([lora], WORDS).name
    monkeypatch.setattr(limits, bound, 12_000)
    told = "would have|is full of what its visitors brought"
    with pytest.raises(UserError, match=told):
        visit.look_at([zipped(lora)])
    for given in ({"pictures": [tmp_path / "a.png"]}, {"tokens": [token]}):
        with pytest.raises(UserError, match=told):
            visit.change(name, WORDS | {"title": "Rex"}, **given)
    concept = visit.mine()[name]
    assert concept.title == "dog" and not concept.references and not concept.embeddings


@pytest.mark.usefixtures("public")
def test_what_browsers_sent_counts_until_it_is_kept(
    visit: Visit, lora: Path, uploads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = uploads / "abc" / "dog.safetensors"
    sent.parent.mkdir()
    shutil.copyfile(lora, sent)
    monkeypatch.setattr(limits, "MAX_PUBLIC_BYTES_IN_ALL", 15_000)
    with pytest.raises(UserError, match="is full of what its visitors brought"):
        visit.add([lora], WORDS)
    own._forget([sent, lora, uploads / "gone.safetensors"])
    assert not sent.exists() and lora.exists()
    assert visit.add([lora], WORDS).name == "dog-2"


def test_what_is_sent_to_ones_own_page_stays_where_it_is(uploads: Path) -> None:
    (uploads / "x.safetensors").touch()
    own._forget([uploads / "x.safetensors"])
    assert (uploads / "x.safetensors").exists()


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize(("bound", "most"), [("MAX_PUBLIC_BYTES", 15_000), ("MAX_PUBLIC_CONCEPTS", 1)])
def test_downloads_at_once_are_not_promised_the_same_room(
    visit: Visit, fake: FakeHub, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    monkeypatch.setattr(limits, bound, most)
    first, second = (visit.add_from_hub(hub.LoraId("us/dog"), WORDS, [], []) for _ in range(2))
    next(first)
    with pytest.raises(UserError, match="remove one, or run the page"):
        next(second)
    first.close()
    assert from_hub(visit).name == "dog-2"  # what is given up leaves its room


def test_nothing_changes_where_a_word_is_out_of_bounds(visit: Visit, lora: Path, token: Path) -> None:
    name = visit.add([lora], WORDS).name
    with pytest.raises(UserError, match="The title has 65 characters"):
        visit.change(name, WORDS | {"title": "x" * 65}, [], [token])
    assert not visit.mine()[name].load().tokens


@pytest.mark.parametrize("chosen", ["new", "kept"])
def test_a_token_that_is_no_good_says_why(visit: Visit, lora: Path, tmp_path: Path, chosen: str) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({"<bad>": torch.full((1, 768), float("nan"))}, bad)
    name = visit.add([lora], WORDS).name
    with pytest.raises(UserError, match="bad.safetensors cannot be used: its tensor '<bad>' holds NaN"):
        visit.look_at([bad]) if chosen == "new" else visit.change(name, {}, [], [bad])
