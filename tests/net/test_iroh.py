"""What only the real network can show: processes that die, forks, striping, strangers, and the library's own faults."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from koinon.errors import DeadlinePassed, FrameMalformed, PeerError, PortInUse, Refused, TransportUnusable
from koinon.net import iroh_buffers, iroh_calls
from koinon.net.clock import run_virtual
from koinon.net.deal import piece_size
from koinon.net.desk import VERBS
from koinon.net.frames import FrameReader
from koinon.net.iroh_channel import HELLO
from koinon.net.iroh_connections import MAX_CHANNELS
from koinon.net.iroh_transport import IrohTransport
from koinon.net.lanes import LANE, Collections, Piece
from koinon.net.stripes import WIDTHS
from koinon.net.transport import Hello, NodeAddr
from koinon.units import Seconds
from tests.net.support import WORK, Ask, Net, Tell, key, play, service

LONG = Seconds(60.0)


@contextlib.asynccontextmanager
async def echo_process(name: str, bind: str = "127.0.0.1:0") -> AsyncIterator[tuple[Any, str]]:
    """A process with an echoing node; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.net.echo_node", name, bind, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def test_a_killed_process_is_missed_by_deadline_and_found_again_on_the_same_port() -> None:
    async def scene(net: Net) -> None:
        a, peer = await net.node("a"), key("b").peer_id
        async with echo_process("b") as (process, address):
            a.learn(NodeAddr(peer, (address,)))
            assert (await a.request(peer, WORK, Ask("before"), deadline=LONG)).header == Tell("before")
            process.kill()
            await process.wait()
            with pytest.raises(DeadlinePassed):
                await a.request(peer, WORK, Ask("dead"), deadline=Seconds(0.5))
        async with echo_process("b", address):
            assert (await a.request(peer, WORK, Ask("back"), deadline=LONG)).header == Tell("back")

    play("iroh", scene)


def test_a_process_killed_under_a_large_body_ends_the_call_by_its_deadline() -> None:
    async def scene(net: Net) -> None:
        a, peer = await net.node("a"), key("b").peer_id
        async with echo_process("b") as (process, address):
            a.learn(NodeAddr(peer, (address,)))
            await a.request(peer, WORK, Ask("before"), deadline=LONG)
            body = bytes(60_000_000)
            call = asyncio.ensure_future(a.request(peer, WORK, Ask("x", len(body)), body, deadline=Seconds(2.0)))
            await asyncio.sleep(0.02)
            process.kill()
            with pytest.raises(PeerError):
                await call

    play("iroh", scene)


def test_the_port_of_another_program_is_refused_by_name() -> None:
    async def scene(net: Net) -> None:
        a = await net.node("a")
        with pytest.raises(PortInUse, match=a.addr.addresses[0]):
            await IrohTransport(key("b"), bind=a.addr.addresses[0]).start([service()])
        for nonsense in ("203.0.113.7:0", "no address"):
            with pytest.raises(TransportUnusable, match="Give an address of this machine"):
                await IrohTransport(key("c"), bind=nonsense).start([service()])

    play("iroh", scene)


def test_a_wildcard_bind_advertises_addresses_that_can_be_dialled() -> None:
    async def scene(net: Net) -> None:
        a = await net.node("a")
        b = IrohTransport(key("b"))
        net.nodes.append(b)
        addr = await b.start([service()])
        assert addr.addresses
        assert not any(address.startswith("0.0.0.0") for address in addr.addresses)
        a.learn(addr)
        assert (await a.request(b.me, WORK, Ask("x"))).header == Tell("x")
        told = IrohTransport(key("c"), advertise=["198.51.100.1:7000"])
        net.nodes.append(told)
        assert (await told.start([service()])).addresses == ("198.51.100.1:7000",)

    play("iroh", scene)


def wide(node: Any, peer: str, rung: int) -> None:
    """As if the path to that peer had been found to need so many lanes."""
    stripes = node._bodies.stripes[peer]
    stripes._rung, stripes._settled_for = rung, 0


async def until_lanes(node: Any, peer: Any, lanes: int) -> None:
    """Send until the lanes stand: they are dialled beside the transfer that wants them."""
    body = Random(1).randbytes(600_000)
    while len(node._connections.standing(peer, LANE)) < lanes:
        await node.request(peer, WORK, Ask("more", len(body)), body)


def test_large_bodies_are_striped_over_lanes_both_ways() -> None:
    async def scene(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        wide(a, b.me, WIDTHS.index(4))
        wide(b, a.me, WIDTHS.index(4))
        await until_lanes(a, b.me, 4)
        body = Random(2).randbytes(7_654_321)
        before = a.links()[b.me]
        replies = await asyncio.gather(
            *(a.request(b.me, WORK, Ask(f"{n}", len(body)), body, deadline=LONG) for n in range(3))
        )
        assert all(reply.body == body for reply in replies)
        after = a.links()[b.me]
        assert after.sent[LANE] - before.sent.get(LANE, 0) > 3 * len(body)
        assert after.received[LANE] - before.received.get(LANE, 0) > 3 * len(body)
        assert after.lanes >= 4

    play("iroh", scene)


def test_a_lane_that_fails_leaves_its_pieces_to_the_others() -> None:
    async def scene(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        wide(a, b.me, WIDTHS.index(4))
        await until_lanes(a, b.me, 4)
        body = Random(3).randbytes(20_000_000)
        call = asyncio.ensure_future(a.request(b.me, WORK, Ask("x", len(body)), body, deadline=LONG))
        sent = a._edges.count(b.me, LANE)
        begun = sent.sent
        while sent.sent < begun + 2_000_000:
            await asyncio.sleep(0)
        a._connections.standing(b.me, LANE)[0].close(0, "pulled out")
        assert (await call).body == body

    play("iroh", scene)


def test_a_piece_that_has_no_place_is_refused_and_a_repeat_changes_nothing() -> None:
    async def main() -> None:
        collections, peer, token, piece = Collections(), key("a").peer_id, b"t" * 16, 1000
        collecting = asyncio.ensure_future(collections.collect(peer, token, 2500, piece))
        await asyncio.sleep(0)
        answered: list[bytes] = []
        fill = iter(b"abcdef")

        async def body(nbytes: int) -> bytearray:
            return bytearray([next(fill)]) * nbytes

        async def write(head: bytes) -> None:
            answered.append(head)

        pipe: Any = SimpleNamespace(body=body, write=write)
        for offset, nbytes in ((1, 1000), (0, 999), (2000, 1000), (3000, 1000), (1 << 40, 1)):
            with pytest.raises(FrameMalformed):
                await collections.add(peer, Piece(token, offset, nbytes), pipe)
        for offset in (2000, 0, 0, 1000):
            await collections.add(peer, Piece(token, offset, min(1000, 2500 - offset)), pipe)
        assert await collecting == b"b" * 1000 + b"d" * 1000 + b"a" * 500
        assert len(answered) == 4

    asyncio.run(main())


def test_a_piece_of_another_peer_s_body_waits_in_vain() -> None:
    async def main() -> None:
        collections, token = Collections(), b"t" * 16
        collecting = asyncio.ensure_future(collections.collect(key("a").peer_id, token, 10, 10))
        await asyncio.sleep(0)
        with pytest.raises(FrameMalformed, match="not announced"):
            await collections.add(key("b").peer_id, Piece(token, 0, 10), SimpleNamespace())  # type: ignore[arg-type]
        collecting.cancel()

    run_virtual(main())


@pytest.mark.parametrize("nbytes", [512 * 1024 + 1, 1 << 20, 8 << 20, 1 << 30])
def test_every_lane_gets_pieces_and_none_is_tiny(nbytes: int) -> None:
    for lanes in WIDTHS[1:]:
        piece = piece_size(nbytes, lanes)
        assert 16 * 1024 <= piece <= 256 * 1024
        assert nbytes / piece >= lanes


async def stranger(net: Net, address: str) -> tuple[Any, Any]:
    """A raw connection to a node, from outside of this code base's manners."""
    import iroh

    options = iroh.EndpointOptions(
        preset=iroh.preset_minimal(),
        relay_mode=iroh.RelayMode.disabled(),
        bind_addr="127.0.0.1:0",
        secret_key=key("stranger").raw,
        alpns=[],
    )
    endpoint = await iroh.Endpoint.bind(options)
    where = iroh.EndpointAddr(iroh.EndpointId.from_string(net.nodes[0].me), None, [address])
    return endpoint, await endpoint.connect(where, WORK.encode())


def test_a_stranger_who_breaks_the_rules_hurts_nobody_else() -> None:
    import iroh

    async def scene(net: Net) -> None:
        server, client = await net.node("server"), await net.node("client")
        address = server.addr.addresses[0]
        random = Random(4)
        for number in range(6):
            endpoint, connection = await stranger(net, address)
            stream = await connection.open_bi()
            send, recv = stream.send(), stream.recv()
            if number % 2:
                await send.write_all(HELLO.head(Hello()))
                reader = FrameReader()
                while reader.header(HELLO) is None:
                    reader.feed(await recv.read(1000))
            noise = (2 << 30).to_bytes(4, "big") if number < 2 else random.randbytes(200)
            await send.write_all(noise)
            if number % 2:  # it has a connection: it is told why, on its stream
                reader = FrameReader()
                while (answer := reader.header(VERBS)) is None:
                    reader.feed(await recv.read(1000))
                assert type(answer).__name__ == "Refusal"
            else:  # it is a stranger: the connection is closed
                with pytest.raises(iroh.IrohError):
                    await connection.accept_bi()
            await endpoint.close()
        assert (await client.request(server.me, WORK, Ask("still here"))).header == Tell("still here")

    play("iroh", scene)


def test_a_peer_may_hold_only_so_many_connections() -> None:
    async def scene(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        for _ in range(MAX_CHANNELS):
            await a._connections.dial(b.me, WORK)
        with pytest.raises(Refused, match="you hold 128 connections"):
            await a._connections.dial(b.me, WORK)

    play("iroh", scene)


def test_many_requests_leave_no_streams_sockets_or_tasks_behind() -> None:
    async def scene(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")

        async def burst() -> None:
            await asyncio.gather(*(a.request(b.me, WORK, Ask(f"{n}", 100), bytes(100)) for n in range(300)))

        await burst()
        descriptors, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
        for _ in range(3):
            await burst()
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert len(asyncio.all_tasks()) <= tasks
        [channel] = a._connections.standing(b.me, WORK)
        assert channel.busy == 0
        assert len(channel._idle) < 64
        assert not iroh_calls._slots or len(iroh_calls._slots) < 200

    play("iroh", scene)


def test_a_connection_to_a_former_boot_is_closed_when_the_new_one_appears() -> None:
    async def scene(net: Net) -> None:
        stuck = asyncio.Event()

        async def hang(_peer: Any, _message: Any, _body: bytearray) -> None:
            stuck.set()
            await asyncio.sleep(3600)

        a, b = await net.node("a"), await net.node("b", [service(hang)])
        call = asyncio.ensure_future(a.request(b.me, WORK, Ask("to the former"), deadline=LONG))
        await stuck.wait()
        again = await net.node("b")  # the same key, while the former hangs without a word
        await again.request(a.me, WORK, Ask("here I am"))
        with pytest.raises(PeerError):
            await call
        assert (await a.request(b.me, WORK, Ask("to the new"))).header == Tell("to the new")

    play("iroh", scene)


# --- processes


def ask_from_a_child(name: str, addr: NodeAddr) -> Any:
    async def main() -> Any:
        node = IrohTransport(key(name), bind="127.0.0.1:0")
        await node.start([service()])
        node.learn(addr)
        reply = await node.request(addr.peer, WORK, Ask("from a child", 5), b"hello", deadline=LONG)
        await node.close()
        return reply.header, bytes(reply.body)

    return asyncio.run(main())


def test_a_process_forked_after_import_can_start_a_node() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["koinon.net.iroh_transport", "tests.net.test_iroh"])

    async def scene(net: Net) -> None:
        server = await net.node("server")
        with context.Pool(2) as pool:
            asked = [pool.apply_async(ask_from_a_child, (name, server.addr)) for name in ("one", "two")]
            answers = await asyncio.gather(*(asyncio.to_thread(answer.get, 60) for answer in asked))
        assert answers == [(Tell("from a child", 5), b"hello")] * 2

    play("iroh", scene)


def test_importing_and_preparing_starts_no_thread_and_says_nothing() -> None:
    code = (
        "import os, koinon.net.iroh_transport, koinon.net.iroh_buffers as b; b.make_usable(); "
        "assert len(os.listdir('/proc/self/task')) == 1; import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- the library's faults


def bindings(lower: Any, lift: Any = bytes, builder: Any = object) -> Any:
    return SimpleNamespace(
        _UniffiFfiConverterBytes=SimpleNamespace(lower=lower, lift=lift), _UniffiRustBufferBuilder=builder
    )


def test_bindings_that_change_bytes_or_have_another_shape_are_not_used() -> None:
    assert iroh_buffers.self_test(bindings(bytes)) < 100
    with pytest.raises(TransportUnusable, match="change a buffer"):
        iroh_buffers.self_test(bindings(lambda data: bytes(data)[:-1] + b"!"))
    with pytest.raises(TransportUnusable, match="not of the kind"):
        iroh_buffers.replace_slow_methods(SimpleNamespace())


def test_bindings_that_copy_byte_by_byte_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(iroh_buffers.time, "process_time", lambda: float(next(ticks)))
    with pytest.raises(TransportUnusable, match="byte by byte"):
        iroh_buffers.self_test(bindings(bytes))


def test_the_known_fault_of_the_installed_bindings_is_mended() -> None:
    from iroh import iroh_ffi

    iroh_buffers.make_usable()
    assert iroh_buffers.self_test(iroh_ffi) < 20, "CPU seconds per GB in the converter: 300 as shipped, 1 mended"


def test_every_kind_of_buffer_crosses_whole() -> None:
    numpy = pytest.importorskip("numpy")
    from iroh import iroh_ffi

    iroh_buffers.make_usable()
    converter = iroh_ffi._UniffiFfiConverterBytes
    array = numpy.arange(6, dtype=numpy.float32)
    for data in (b"", b"abc", bytearray(b"abc"), memoryview(b"abcdef")[2:5], memoryview(array), array):
        assert converter.lift(converter.lower(data)) == bytes(data)
    with pytest.raises((BufferError, ValueError)):
        converter.lower(array[::2])
    with pytest.raises(TypeError):
        converter.lower("text")


def test_the_way_of_waiting_is_only_replaced_where_it_is_known() -> None:
    from iroh import iroh_ffi

    iroh_buffers.make_usable()
    assert iroh_ffi._uniffi_rust_call_async.__module__ == iroh_calls.__name__
    other = SimpleNamespace(_uniffi_rust_call_async=echo_process)
    assert not iroh_calls.shorten(other)
    assert other._uniffi_rust_call_async is echo_process
