"""Makes iroh's Python bindings fit for tensors: bytes go out by one memory copy, and waiting costs one wake-up.

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
from koinon.net import iroh_calls

_MARK: Final = "_koinon_buffers"
_SLOW_LOOP: Final = "self.rbuf.data[self.rbuf.len + i] = byte"
_PREFIX: Final = struct.Struct(">i")
"""A bytes argument is its length, a signed 32-bit number, and its content."""
_MAX_BYTES: Final = 2**31 - 1 - _PREFIX.size
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
    replace_slow_methods(iroh_ffi)
    self_test(iroh_ffi)
    iroh_calls.shorten(iroh_ffi)
    setattr(iroh_ffi, _MARK, True)


def self_test(bindings: Any) -> float:
    """Pass buffers through the converter and read them back: they must be equal, and quick.

    Returns CPU seconds per GB of the largest. Raises TransportUnusable.
    """
    pattern = bytes(range(256)) * (_TEST_BYTES // 256)
    converter, spent = bindings._UniffiFfiConverterBytes, 0.0
    for data in (b"", b"\x00", bytearray(pattern[:17]), memoryview(pattern)[3:4096], pattern):
        started = time.process_time()
        returned = converter.lift(converter.lower(data))
        spent = time.process_time() - started
        if returned != bytes(data):
            raise TransportUnusable(f"iroh's bindings change a buffer on its way out. {_ADVICE}")
    if spent > _TEST_SECONDS:
        raise TransportUnusable(f"iroh's bindings copy byte by byte ({spent:.2f} s for 1 MiB). {_ADVICE}")
    return spent / _TEST_BYTES * 1e9


def replace_slow_methods(bindings: Any) -> None:
    """Where the loop is, and nowhere else. Raises TransportUnusable for bindings of another kind."""
    builder = getattr(bindings, "_UniffiRustBufferBuilder", None)
    converter = getattr(bindings, "_UniffiFfiConverterBytes", None)
    if builder is None or converter is None:
        raise TransportUnusable(f"iroh's bindings are not of the kind that this build knows. {_ADVICE}")
    if _has_slow_loop(builder.write):
        rust_buffer = bindings._UniffiRustBuffer
        converter.lower = staticmethod(lambda value: _lower(rust_buffer, value))
        converter.lift = staticmethod(_lift)


def _has_slow_loop(method: Any) -> bool:
    try:
        return _SLOW_LOOP in inspect.getsource(method)
    except (OSError, TypeError):  # no source beside the bindings: nothing is known, and the self test decides
        return False


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of the stable ABI: the only way from Python to the address of a read-only view."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer: Final = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int)(
    ("PyObject_GetBuffer", ctypes.pythonapi)
)
_release_buffer: Final = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyBuffer_Release", ctypes.pythonapi))


def _lower(rust_buffer: Any, value: Any) -> Any:
    """A Rust buffer with length and content of any contiguous buffer; lengths are bytes, never elements.

    Raises TypeError for what is no buffer, BufferError or ValueError for one with gaps, ValueError for 2 GiB and more.
    """
    view = _PyBuffer()
    _get_buffer(value, ctypes.addressof(view), 0)
    try:
        if view.len > _MAX_BYTES:
            raise ValueError("one call carries less than 2 GiB: write in pieces")
        lowered = rust_buffer.alloc(view.len + _PREFIX.size)
        address = ctypes.cast(lowered.data, ctypes.c_void_p).value
        assert address is not None
        ctypes.memmove(address, _PREFIX.pack(view.len), _PREFIX.size)
        if view.len:
            ctypes.memmove(address + _PREFIX.size, view.buf, view.len)
        lowered.len = view.len + _PREFIX.size
        return lowered
    finally:
        _release_buffer(ctypes.addressof(view))


def _lift(lowered: Any) -> bytes:
    """The content of a Rust buffer, which is freed."""
    try:
        address = ctypes.cast(lowered.data, ctypes.c_void_p).value
        assert address is not None
        (length,) = _PREFIX.unpack(ctypes.string_at(address, _PREFIX.size))
        if length != lowered.len - _PREFIX.size:
            raise ValueError(f"a buffer of {lowered.len} bytes says that it holds {length}")
        return ctypes.string_at(address + _PREFIX.size, length)
    finally:
        lowered.free()
