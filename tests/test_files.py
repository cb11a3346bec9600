"""What file systems differ in."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from iteris_sd import files, formats, guessing
from iteris_sd.errors import UserError
from iteris_sd.storybook import data
from iteris_sd.training import photos
from tests.test_formats import peft

MAPS = Path("/proc/self/maps")
maps = pytest.mark.skipif(not MAPS.exists(), reason="what is mapped is told as Linux does")


@pytest.mark.parametrize("held", [0, 1, 2, 3])
def test_a_move_is_tried_again_while_somebody_holds_the_file(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_TRIES", 3)
    monkeypatch.setattr(files, "_PAUSE", 0.0)
    tried: list[int] = []

    def move() -> str:
        tried.append(1)
        if len(tried) <= held:
            raise PermissionError("in use")
        return "moved"

    if held < 3:
        assert files.patiently(move) == "moved"
    else:
        with pytest.raises(PermissionError):
            files.patiently(move)
    assert len(tried) == min(held + 1, 3)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("con", "con-"),
        ("NUL", "NUL-"),
        ("com1", "com1-"),
        ("lpt9", "lpt9-"),
        ("com", "com"),
        ("console", "console"),
    ],
)
def test_names_of_devices_are_changed(stem: str, name: str) -> None:
    assert files.possible(stem) == name


def test_the_nearest_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.nearest(tmp_path / "a" / "b") == tmp_path
    assert files.nearest(tmp_path) == tmp_path
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(UserError, match="There is no .+; choose a drive or folder that is there"):
        files.nearest(Path("out"))


def test_what_a_mac_writes_beside_files_is_passed_over(tmp_path: Path) -> None:
    lora = peft(tmp_path / "dog.safetensors")
    (tmp_path / "._dog.safetensors").write_bytes(b"\x00\x05\x16\x07")
    assert formats.read(tmp_path).lora.keys() == formats.read(lora).lora.keys()
    Image.new("RGB", (8, 8)).save(tmp_path / "dog.png")
    (tmp_path / "._dog.png").write_bytes(b"\x00\x05\x16\x07")
    assert len(photos.read_photos(tmp_path)) == 1


def test_a_lora_at_the_top_of_a_drive_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = formats.read(peft(tmp_path / "lora.safetensors"))
    monkeypatch.setattr(Path, "absolute", lambda path: Path("/lora.safetensors"))
    assert guessing.concept(Path("lora.safetensors"), content).name == "lora"


@maps
def test_a_refused_file_is_not_mapped_while_its_error_lasts(tmp_path: Path) -> None:
    path = peft(tmp_path / "failed.safetensors", up=torch.full((6, 2), float("nan")))
    with pytest.raises(UserError, match="NaN or infinity"):
        try:
            formats.read(path)
        except UserError:
            assert path.name not in MAPS.read_text()
            raise


@maps
def test_drawn_scenes_are_not_mapped_when_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, seen = Path.rename, []

    def watched(path: Path, target: Path) -> Path:
        seen.append(path.name in MAPS.read_text())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    data.drawn(tmp_path, 2, workers=1)
    assert seen == [False]
