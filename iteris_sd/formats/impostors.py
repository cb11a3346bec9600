"""Files that are called .safetensors and are something else, told by their first bytes; each with what to do."""

from iteris_sd.errors import UserError

START_BYTES = 512  # enough for every mark here; tar's stands at 257
_QUOTED_CHARS = 160  # of a text that came for a file: a sentence

PICKLE = (
    "a pickle can run any code when it is opened, so only .safetensors files are; if you trust it, convert it where "
    "you trained it: torch.load, then safetensors.torch.save_file"
)
_AGAIN = "download it again from its page's download link, logged in where the page asks for that"
_ARCHIVE = "an archive; unpack it and take the .safetensors file inside"
_ZIP = "a zip archive, or a PyTorch pickle, which is one too; unpack it and take the .safetensors file inside, if any"
_PICTURE = "a picture, not the model that it shows; download the file of the model itself"

_MARKS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"PK\x03\x04", _ZIP),
    (b"PK\x05\x06", _ZIP),
    (b"\x1f\x8b", _ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
    (b"Rar!", _ARCHIVE),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE),
    (b"\xfd7zXZ", _ARCHIVE),
    (b"BZh", _ARCHIVE),
    (b"\x89PNG", _PICTURE),
    (b"\xff\xd8\xff", _PICTURE),
    (b"GIF8", _PICTURE),
    (b"RIFF", _PICTURE),
    (b"GGUF", "a GGUF file, whose weights are quantised; look for the .safetensors file of the same LoRA"),
    (b"\x89HDF", "an HDF5 file of Keras; look for the .safetensors file of the same LoRA"),
    (b"%PDF", "a PDF, not the file itself; download the file of the model"),
    *((bytes([0x80, n]), f"a PyTorch pickle; {PICKLE}") for n in (2, 3, 4, 5)),
)


def check(start: bytes) -> None:
    """Raise UserError, "it is …", when a file's first `START_BYTES` are those of something known."""
    what = _what(start)
    if what:
        raise UserError(f"it is {what}.")


def _what(start: bytes) -> str:
    if not any(start):
        return "nothing but zeros where it should begin, as of a download that was not finished; download it again"
    if start.startswith(b"PK") and b"data.pkl" in start:
        return f"a PyTorch pickle; {PICKLE}"
    if start[257:262] == b"ustar":
        return _ARCHIVE
    mark = next((what for mark, what in _MARKS if start.startswith(mark)), "")
    return mark or _text(start)


def _text(start: bytes) -> str:
    """What a text is that came in the place of a file; nothing where the bytes are no text."""
    words = start.removeprefix(b"\xef\xbb\xbf").strip()
    if not words or any(byte < 0x20 and byte not in b"\t\r\n" for byte in words):
        return ""
    if words.lower().startswith(b"<?xml"):
        return f"a server's answer in XML, not the file itself; {_AGAIN}"
    if words.startswith(b"<"):
        return f"a web page, not the file itself; {_AGAIN}"
    quoted = words.decode("utf-8", "replace")
    more = "…" if len(quoted) > _QUOTED_CHARS else ""
    return f"a text, not the file itself, and says {quoted[:_QUOTED_CHARS] + more!r}; {_AGAIN}"
