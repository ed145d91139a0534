"""Content from several sources: right, resumable, and a liar is named."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import ChunkUnavailable, FrameMalformed, FrameTooLarge
from koinon.net.chunks import (
    BULK,
    CHUNK,
    REPLIES,
    REQUESTS,
    ChunkGiven,
    ChunkLater,
    ChunkStore,
    ChunkWanted,
    Entry,
    FileSink,
    Manifest,
    MemorySink,
    decode_manifest,
    manifest_of,
    manifest_of_file,
)
from koinon.net.fetch import fetch, fetch_manifest
from koinon.net.transport import Service
from koinon.units import Bytes
from tests.net.support import Net, play

CONTENT = Random(0).randbytes(3 * CHUNK + 12_345)
MANIFEST = manifest_of(CONTENT, [Entry("w", "float32", (2, 3), 0, 24)])


async def source(net: Net, name: str, content: bytes = CONTENT, manifest: Manifest = MANIFEST) -> Any:
    store = ChunkStore()
    store.add_bytes(manifest, content)
    return await net.node(name, [store.service()])


async def liar(net: Net, name: str) -> Any:
    async def lie(_peer: str, _message: Any, _body: bytearray) -> Any:
        return ChunkGiven(100), bytes(100)

    return await net.node(name, [Service(BULK, REQUESTS, REPLIES, lie)])


async def asker(net: Net) -> Any:
    return await net.node("asker", [Service(BULK, REQUESTS, REPLIES)])


@pytest.mark.parametrize("carrier", ["memory", "iroh"])
def test_content_comes_from_several_sources(carrier: str) -> None:
    async def scene(net: Net) -> None:
        a, b, me = await source(net, "a"), await source(net, "b"), await asker(net)
        manifest = await fetch_manifest(me, [a.me, b.me], MANIFEST.root, limit=Bytes.mib(64))
        sink = MemorySink(manifest)
        fetched = await fetch(me, [a.me, b.me], manifest, sink)
        assert sink.content() == CONTENT
        assert manifest.entries[0].shape == (2, 3)
        assert sum(fetched.nbytes.values()) == len(CONTENT)
        assert fetched.faults == []

    play(carrier, scene)


def test_a_wrong_chunk_names_its_sender_and_costs_only_itself() -> None:
    async def scene(net: Net) -> None:
        good, bad, me = await source(net, "good"), await liar(net, "bad"), await asker(net)
        sink = MemorySink(MANIFEST)
        fetched = await fetch(me, [bad.me, good.me], MANIFEST, sink)
        assert sink.content() == CONTENT
        assert set(fetched.wrong_by) == {bad.me}
        assert fetched.nbytes == {good.me: len(CONTENT)}

    play("memory", scene)


def test_when_every_source_fails_the_error_says_what_each_did() -> None:
    async def scene(net: Net) -> None:
        bad, me = await liar(net, "bad"), await asker(net)
        empty = await source(net, "empty", b"", manifest_of(b""))
        with pytest.raises(ChunkUnavailable) as caught:
            await fetch(me, [bad.me, empty.me], MANIFEST, MemorySink(MANIFEST))
        assert "another hash" in caught.value.answers[bad.me]
        assert caught.value.answers[empty.me] == "does not have it"
        with pytest.raises(ChunkUnavailable, match="there is no source"):
            await fetch(me, [], MANIFEST, MemorySink(MANIFEST))

    play("memory", scene)


def test_a_source_that_dies_is_replaced_by_the_others() -> None:
    async def scene(net: Net) -> None:
        a, b, me = await source(net, "a"), await source(net, "b"), await asker(net)
        sink = MemorySink(MANIFEST)
        call = asyncio.ensure_future(fetch(me, [a.me, b.me], MANIFEST, sink))
        await asyncio.sleep(0.0035)  # requests are under way
        a.kill()
        fetched = await call
        assert sink.content() == CONTENT
        assert fetched.nbytes[b.me] > 0

    play("memory", scene)


def test_what_is_on_disk_is_not_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "content"
    half = bytearray(CONTENT[: 2 * CHUNK])
    half[CHUNK + 5] ^= 1  # the second chunk was torn
    path.write_bytes(half)

    async def scene(net: Net) -> None:
        a, me = await source(net, "a"), await asker(net)
        sink = FileSink(path, MANIFEST)
        assert sink.held() == {0}
        fetched = await fetch(me, [a.me], MANIFEST, sink)
        assert fetched.nbytes == {a.me: len(CONTENT) - CHUNK}
        assert path.read_bytes() == CONTENT
        assert (await fetch(me, [], MANIFEST, sink)).nbytes == {}

    play("memory", scene)


def test_a_file_is_served_from_disk_and_no_more_once_removed(tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    manifest = manifest_of_file(path)
    assert manifest.chunks == MANIFEST.chunks

    async def scene(net: Net) -> None:
        store = ChunkStore()
        store.add_file(manifest, path)
        a, me = await net.node("a", [store.service()]), await asker(net)
        sink = MemorySink(manifest)
        await fetch(me, [a.me], manifest, sink)
        assert sink.content() == CONTENT
        store.remove(manifest)
        reply = await me.request(a.me, BULK, ChunkWanted(manifest.chunks[0].digest))
        assert not reply.body

    play("memory", scene)


def test_the_same_bytes_at_two_places_are_one_chunk_to_serve() -> None:
    twice = bytes(2 * CHUNK)
    manifest = manifest_of(twice)

    async def scene(net: Net) -> None:
        a, me = await source(net, "a", twice, manifest), await asker(net)
        sink = MemorySink(manifest)
        await fetch(me, [a.me], manifest, sink)
        assert sink.content() == twice

    play("memory", scene)


@given(st.binary(max_size=300))
def test_only_the_manifest_with_that_root_is_taken(data: bytes) -> None:
    limit = Bytes(len(CONTENT))
    assert decode_manifest(MANIFEST.encode(), MANIFEST.root, limit=limit) == MANIFEST
    with pytest.raises(FrameMalformed):
        decode_manifest(data, MANIFEST.root, limit=limit)


def test_a_manifest_is_bounded_and_its_chunks_are_full() -> None:
    with pytest.raises(FrameTooLarge):
        decode_manifest(MANIFEST.encode(), MANIFEST.root, limit=Bytes(len(CONTENT) - 1))
    uneven = Manifest(tuple(reversed(MANIFEST.chunks)))
    with pytest.raises(FrameMalformed, match="short chunk"):
        decode_manifest(uneven.encode(), uneven.root, limit=Bytes.mib(64))


def test_a_chunk_that_claims_too_much_is_malformed() -> None:
    encoded = msgspec.msgpack.encode([[[b"\0" * 32, CHUNK + 1]], []])
    root = sha256(encoded).hexdigest()
    with pytest.raises(FrameMalformed):
        decode_manifest(encoded, root, limit=Bytes.mib(64))


def test_a_source_that_is_busy_is_asked_again_and_is_at_no_fault() -> None:
    async def scene(net: Net) -> None:
        store, asked = ChunkStore(), []
        store.add_bytes(MANIFEST, CONTENT)

        async def later(peer: str, message: Any, body: bytearray) -> Any:
            asked.append(message)
            return ChunkLater(300) if len(asked) <= 5 else await store.answer(peer, message, body)

        busy, me = await net.node("busy", [Service(BULK, REQUESTS, REPLIES, later)]), await asker(net)
        sink = MemorySink(MANIFEST)
        fetched = await fetch(me, [busy.me], MANIFEST, sink)
        assert sink.content() == CONTENT
        assert fetched.faults == []

    play("memory", scene)


def test_what_few_sources_have_is_asked_for_first() -> None:
    async def scene(net: Net) -> None:
        whole, me = await source(net, "whole"), await asker(net)
        part = await source(net, "part", CONTENT[:CHUNK], manifest_of(CONTENT[:CHUNK]))
        sink = MemorySink(MANIFEST)
        fetched = await fetch(me, [part.me, whole.me], MANIFEST, sink)
        assert sink.content() == CONTENT
        assert fetched.nbytes[whole.me] >= len(CONTENT) - CHUNK
        assert fetched.wrong_by == []

    play("memory", scene)
