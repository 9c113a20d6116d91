"""What a file is follows from its first bytes: compression, then content; a name only decides where bytes cannot."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bz2"}
"""First bytes → compression."""
CHUNK_BYTES = 1 << 20
_GZIP_CHUNK_BYTES = 1 << 16
_GZIP_WINDOW_BITS = 31  # 15 bits of window, plus 16: expect a gzip header and check the trailer


class BrokenStream(Exception):
    """The compressed bytes end early or are not what they should be."""


def compression_of(head: bytes) -> str | None:
    """How the file that begins with these bytes is compressed; None: it is not."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def chunks(stream: Any, num_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of a binary file, piece by piece."""
    while chunk := stream.read(num_bytes):
        yield chunk


def decompressed(stream: Any, compression: str) -> Iterator[bytes]:
    """Decompressed bytes, of one or more members; everything that can be had comes before the error.

    Raises:
        BrokenStream: Truncated, or corrupt.
    """
    if compression == "gzip":
        yield from (piece for piece in _gunzip(chunks(stream, _GZIP_CHUNK_BYTES)) if piece)
        return
    openers: dict[str, Callable[[Any], Any]] = {"bz2": bz2.BZ2File, "xz": lzma.LZMAFile, "zstd": _zstd}
    try:
        yield from chunks(openers[compression](stream))
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise BrokenStream(f"{compression}: {error}") from error


def _zstd(stream: Any) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


def _gunzip(pieces: Iterator[bytes]) -> Iterator[bytes]:
    member = zlib.decompressobj(_GZIP_WINDOW_BITS)
    for chunk in pieces:
        rest = chunk
        while rest:
            if member.eof:
                rest = rest.lstrip(b"\0")  # tape padding between and after members is legal
                if not rest:
                    break
                member = zlib.decompressobj(_GZIP_WINDOW_BITS)
            before = member.copy()
            try:
                data = member.decompress(rest, CHUNK_BYTES)
            except zlib.error as error:
                yield from _salvage(before, rest)
                raise BrokenStream(str(error)) from error
            if data:
                yield data
            rest = member.unused_data if member.eof else member.unconsumed_tail
    if not member.eof:
        yield member.flush()
        raise BrokenStream("the compressed data ends before the end-of-stream marker")


def _salvage(member: Any, data: bytes) -> Iterator[bytes]:
    # zlib throws away what it had decompressed when it meets an error; byte by byte nothing before it is lost.
    for start in range(len(data)):
        try:
            yield member.decompress(data[start : start + 1])
        except zlib.error:
            return


class Unread:
    """A binary file, read front to back, whose first bytes were looked at; a failed read is remembered."""

    def __init__(self, head: bytes, rest: Any) -> None:
        """`rest` is a file, or the pieces that follow."""
        self._held, self._rest = head, rest
        self.failure: OSError | None = None
        self._broken: BrokenStream | None = None

    def read(self, num_bytes: int | None = -1) -> bytes:
        """As a file's; fewer bytes than asked for only at the end."""
        wanted = -1 if num_bytes is None else num_bytes
        parts = [self._held]
        size = len(self._held)
        while wanted < 0 or size < wanted:
            try:
                piece = self._next(CHUNK_BYTES if wanted < 0 else wanted - size)
            except BrokenStream as error:  # what came before it is given first
                self._broken, piece = error, b""
            if not piece:
                break
            parts.append(piece)
            size += len(piece)
        data = b"".join(parts)
        if self._broken is not None and not data:
            raise self._broken
        found, self._held = (data, b"") if wanted < 0 else (data[:wanted], data[wanted:])
        return found

    def _next(self, num_bytes: int) -> bytes:
        if self._broken is not None:
            return b""
        if not hasattr(self._rest, "read"):
            return next(self._rest, b"")
        try:
            data: bytes = self._rest.read(num_bytes)
            return data
        except OSError as error:
            self.failure = error
            raise

    def readable(self) -> bool:
        """What readers of files ask."""
        return True

    def close(self) -> None:
        """What readers of files ask; whoever opened the file closes it."""

    @property
    def closed(self) -> bool:
        """What readers of files ask."""
        return False
