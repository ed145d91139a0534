"""A term store in a file, for processes of one machine (or of one shared disk).

    terms          first line: "kointerms1 " and the sha-256 of the rest; the rest: the `Book` as JSON
    terms.lock     held while the file is replaced; the system lets go of it however a process ends
    terms.draft    what a crash may leave behind; the next writer overwrites it

The file is replaced whole, by rename, after its bytes are on the disk: kill -9 at any instant leaves the book before or
the book after. Bytes that are no book are an error, never an empty book: a store that forgot its terms would give one
out twice. Knows nothing of who holds what, and why.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from koinon.errors import TermStoreCorrupt, room
from koinon.run.record import Equivocation, Head
from koinon.run.terms import Book, Term, enrolled, renewed, revoked, taken
from koinon.units import PeerId, RunId, Seconds

_MAGIC = b"kointerms1 "
_LARGEST = 16 * 2**20
_decoder = msgspec.json.Decoder(Book)


class FileTermStore:
    """Implements `TermStore`. clock: seconds that all processes agree on."""

    def __init__(self, path: Path, run: RunId, *, clock: Callable[[], float] = time.time) -> None:
        self.path, self.run, self._clock = path, run, clock
        self._seen: tuple[tuple[int, int, int], Book] | None = None
        self._reading = threading.Lock()  # changes are made in a thread, looks in the caller's

    @property
    def grace(self) -> Seconds:
        return Seconds(0.0)  # one machine has one clock

    def now(self) -> float:
        return self._clock()

    async def book(self) -> Book:
        return self.read()

    async def take(self, term: Term, *, after: int, lease: Seconds) -> Term:
        return await asyncio.to_thread(
            self._change,
            lambda book: taken(book, term, after=after, now=self.now(), lease=lease, grace=self.grace),
        )

    async def renew(self, number: int, holder: PeerId, *, lease: Seconds, begins: Head | None = None) -> Term:
        return await asyncio.to_thread(
            self._change, lambda book: renewed(book, number, holder, now=self.now(), lease=lease, begins=begins)
        )

    async def enrol(self, guest: PeerId) -> None:
        await asyncio.to_thread(self._replaced_by, lambda book: enrolled(book, guest))

    async def revoke(self, proof: Equivocation) -> Term:
        return await asyncio.to_thread(self._change, lambda book: revoked(book, proof))

    def read(self) -> Book:
        """The book as it lies there; an empty one where there is no file yet. Raises TermStoreCorrupt."""
        with self._reading:
            return self._read()

    def _read(self) -> Book:
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                mark = (status.st_ino, status.st_mtime_ns, status.st_size)
                if self._seen is not None and self._seen[0] == mark:
                    return self._seen[1]
                data = file.read(_LARGEST + 1)
        except FileNotFoundError:
            if self._seen is not None and self._seen[1].terms:
                raise TermStoreCorrupt(
                    f"{self.path} is gone, and with it who holds which term: bring it back."
                ) from None
            return Book(self.run)
        book = self._parsed(data)
        if self._seen is not None and len(book.terms) < len(self._seen[1].terms):
            raise self._corrupt(f"it knew {len(self._seen[1].terms)} terms a moment ago and has {len(book.terms)} now")
        self._seen = (mark, book)
        return book

    def _change(self, change: Callable[[Book], Book]) -> Term:
        after = self._replaced_by(change)
        assert after.current is not None
        return after.current

    def _replaced_by(self, change: Callable[[Book], Book]) -> Book:
        """Read, decide and replace, while nobody else can."""
        lock = os.open(self.path.with_name(f"{self.path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.read()
            after = change(before)
            if after != before:
                self._replace(after)
            return after
        finally:
            os.close(lock)

    def _replace(self, book: Book) -> None:
        body = msgspec.json.encode(book)
        draft = self.path.with_name(f"{self.path.name}.draft")
        with room(self.path):
            with draft.open("wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _parsed(self, data: bytes) -> Book:
        head, _, body = data.partition(b"\n")
        if len(data) > _LARGEST or head != _MAGIC + hashlib.sha256(body).hexdigest().encode():
            raise self._corrupt("its bytes do not match their checksum")
        try:
            book = _decoder.decode(body)
        except msgspec.DecodeError as error:
            raise self._corrupt(str(error)) from error
        if book.run != self.run:
            raise self._corrupt(f"it is that of run {book.run[:10]}, this is run {self.run[:10]}")
        numbers = [term.number for term in book.terms]
        if numbers != sorted(set(numbers)):
            raise self._corrupt("its terms are not in order")
        return book

    def _corrupt(self, why: str) -> TermStoreCorrupt:
        return TermStoreCorrupt(
            f"The term store {self.path} cannot be believed ({why}). It is left as it is: bring back a copy of it; or, "
            f"when no process of this run is alive, remove it and resume the run whose log is longest."
        )
