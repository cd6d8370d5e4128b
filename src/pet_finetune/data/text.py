"""The content of a data file as text: unpacked, decoded, with plain line ends."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

__all__ = ["NamedBytes", "NamedText", "is_binary", "load_bytes", "to_text", "unpacked_name"]

_logger = get_logger(__name__)

_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NamedText(io.StringIO):
    """Text in memory under the name of its file, which some of ASE's readers ask for."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


class NamedBytes(io.BytesIO):
    """Bytes in memory under the name of their file."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def unpacked_name(file: Path) -> str:
    """The name of a file without the ending of its compression."""
    return file.stem if file.suffix.lower() in _UNPACK else file.name


def load_bytes(file: Path) -> bytes:
    """The whole content of a file, unpacked in one go where it is compressed.

    ASE seeks in compressed files, and every step back unpacks from the start: hours for what
    takes a second.

    Raises:
        DataError: the file cannot be read or unpacked.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read '{file}': {error.strerror}.") from error
    unpack = _UNPACK.get(file.suffix.lower())
    if unpack is None:
        return data
    try:
        return unpack(data)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{file} cannot be unpacked ({error}): it is damaged, cut off, or not compressed as "
            "its ending says. Copy it again, or unpack it yourself to see what is left."
        ) from error


def is_binary(data: bytes) -> bool:
    """Whether the content is no text in any encoding that is read."""
    if any(data.startswith(mark) for mark, _ in _MARKS):
        return False
    return b"\0" in data[:8192]


def to_text(data: bytes, source: str) -> str:
    """Text of any usual encoding, without a byte-order mark, with plain line ends.

    What is not UTF-8 and has no mark is Latin-1, in which every byte has a meaning; elements,
    numbers and names of labels are the same in both.

    Args:
        data: the content of the file.
        source: the file, for the log.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("latin-1")
        _logger.info("%s is not UTF-8; it is read as Latin-1", source)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text
