"""Makes iroh's Python bindings fit for tensors: outgoing buffers by one memory copy instead of a byte at a time.

The generated bindings of iroh 1.2 (uniffi 0.31) store every outgoing byte in a Python loop: 2 MB/s and about 300 CPU
seconds per GB. uniffi 0.32 has the remedy, the wheels of iroh 1.2 do not. The loop is looked for in the source of the
methods, not guessed from a version, so nothing changes where it is gone. A node never runs with the slow path: either
the self test passes or `TransportUnusable` says what to install.
Starts no threads and binds nothing, so it may run before a fork.
"""

from __future__ import annotations

import ctypes
import inspect
import struct
import time
from typing import Any, Final

from koinon.errors import TransportUnusable

_MARK: Final = "_koinon_buffers"
_SLOW_LOOP: Final = "self.rbuf.data[self.rbuf.len + i] = byte"
_MAX_BYTES: Final = 2**31 - 1
"""The length prefix of a bytes argument is a signed 32-bit number."""
_TEST_BYTES: Final = 1 << 20
_TEST_SECONDS: Final = 0.2
"""The copy takes 1 ms of CPU for the test's buffer, the loop 300 ms."""
_ADVICE: Final = "Install iroh>=1.2,<1.3 again (`pip install --force-reinstall 'iroh>=1.2,<1.3'`)."


def make_usable() -> None:
    """Replace the slow methods where they are, and prove it. Cheap when done before. Raises TransportUnusable."""
    try:
        from iroh import iroh_ffi
    except ImportError as error:
        raise TransportUnusable(f"iroh cannot be loaded: {error}. {_ADVICE}") from error
    if getattr(iroh_ffi, _MARK, False):
        return
    _replace_slow_methods(iroh_ffi)
    self_test(iroh_ffi)
    setattr(iroh_ffi, _MARK, True)


def self_test(bindings: Any) -> float:
    """Pass buffers through the converter and read them back: they must be equal, and quick.

    Returns CPU seconds per GB of the largest. Raises TransportUnusable.
    """
    pattern = bytes(range(256)) * (_TEST_BYTES // 256)
    spent = 0.0
    for data in (b"", b"\x00", bytearray(pattern[:17]), memoryview(pattern)[3:4096], pattern):
        started = time.process_time()
        returned = _round_trip(bindings, data)
        spent = time.process_time() - started
        if returned != bytes(data):
            raise TransportUnusable(f"iroh's bindings change a buffer on its way out. {_ADVICE}")
    if spent > _TEST_SECONDS:
        raise TransportUnusable(f"iroh's bindings copy byte by byte ({spent:.2f} s for 1 MiB). {_ADVICE}")
    return spent / _TEST_BYTES * 1e9


def _round_trip(bindings: Any, data: Any) -> Any:
    converter = bindings._UniffiFfiConverterBytes
    with converter.lower(data).consume_with_stream() as stream:  # frees the buffer, and fails when bytes are left over
        return converter.read(stream)


def _replace_slow_methods(bindings: Any) -> None:
    builder = getattr(bindings, "_UniffiRustBufferBuilder", None)
    converter = getattr(bindings, "_UniffiFfiConverterBytes", None)
    if builder is None or converter is None:
        raise TransportUnusable(f"iroh's bindings are not of the kind that this build knows. {_ADVICE}")
    if _has_slow_loop(builder.write) and _has_slow_loop(builder._pack_into):
        builder.write, builder._pack_into = _write, _pack_into
        converter.write = staticmethod(_write_bytes)


def _has_slow_loop(method: Any) -> bool:
    try:
        return _SLOW_LOOP in inspect.getsource(method)
    except (OSError, TypeError):  # no source beside the bindings: nothing is known, and the self test decides
        return False


def _write(self: Any, value: Any) -> None:
    """Append a flat bytes-like object."""
    _copy_in(self, memoryview(value))


def _pack_into(self: Any, size: int, format: str, value: Any) -> None:
    """Append one number; the caller's size must agree with the format."""
    packed = struct.pack(format, value)
    if len(packed) != size:
        raise ValueError(f"{format!r} packs {len(packed)} bytes, not {size}")
    _copy_in(self, memoryview(packed))


def _write_bytes(value: Any, buffer: Any) -> None:
    """Length prefix and content of one bytes argument.

    The stock method counts elements, so a view of 32-bit numbers would be cut to a quarter; here it is refused.
    """
    view = memoryview(value)
    if view.ndim != 1 or view.itemsize != 1 or not view.c_contiguous:
        raise TypeError("pass flat, contiguous bytes: memoryview(array).cast('B')")
    if view.nbytes > _MAX_BYTES:
        raise ValueError("one call carries less than 2 GiB: write in pieces")
    buffer.write_i32(view.nbytes)
    buffer.write(view)


def _copy_in(builder: Any, view: memoryview) -> None:
    with builder._reserve(view.nbytes):  # makes room, and afterwards adds nbytes to rbuf.len
        if view.nbytes:
            target = ctypes.addressof(builder.rbuf.data.contents) + builder.rbuf.len
            source, _alive = _address(view)
            ctypes.memmove(target, source, view.nbytes)


def _address(view: memoryview) -> tuple[int, object]:
    """Address of the view's first byte, and the object that must stay alive while it is used."""
    if not view.readonly:
        array = (ctypes.c_char * view.nbytes).from_buffer(view)
        return ctypes.addressof(array), array
    data = view.obj if type(view.obj) is bytes and view.nbytes == len(view.obj) else bytes(view)
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0, data
