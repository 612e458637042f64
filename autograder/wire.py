"""The narrow channel between the judge and the process that runs a student's code: frames of plain numbers and texts, never pickle.

A frame is two lengths (4 bytes each, big-endian), a JSON object, and the bytes of the arrays that it announces. Both sides cap what they
read; dtypes and shapes are checked before any memory is asked for. Arrays of texts travel in the JSON. A deadline holds for a whole
frame: a socket's own time limit begins anew with each byte, so one byte a second would keep the judge waiting for ever.
"""
import json
import math
import struct
import time

import numpy as np

HEAD = 8_000_000         # bytes of JSON
ARRAYS = 16_000_000      # bytes of numbers in one frame; no exercise has a twentieth of that
ENTRIES = 1000           # arrays in one frame
DTYPES = frozenset({"float32", "float64", "int64", "uint8", "int32", "bool"})
_LENGTHS = struct.Struct("!II")


class Broken(Exception):
    """What came is no frame, or more than is allowed, in one sentence; `closed` if the other side is gone."""

    closed = False


class Closed(Broken):
    closed = True


def send(channel, head, arrays=None, deadline=None):
    """Send a JSON object and a dict of arrays; ValueError for what the channel does not carry, TimeoutError after `deadline` (of time.monotonic)."""
    numbers, texts, layout = [], {}, []
    for name, value in (arrays or {}).items():
        value = np.asarray(value)
        if value.dtype.kind == "U":
            texts[name] = [list(value.shape), value.ravel().tolist()]
            continue
        if value.dtype.name not in DTYPES:
            raise ValueError(f"{name} has dtype {value.dtype}, which the channel does not carry")
        layout.append([name, value.dtype.name, list(value.shape)])
        numbers.append(np.ascontiguousarray(value))
    text = json.dumps({**head, "arrays": layout, "texts": texts}).encode()
    size = sum(a.nbytes for a in numbers)
    if len(text) > HEAD or size > ARRAYS or len(layout) + len(texts) > ENTRIES:
        raise ValueError(f"{len(layout)} arrays of {size} bytes and {len(text)} bytes of text are more than the channel carries")
    for part in (_LENGTHS.pack(len(text), size) + text, *(array.data.cast("B") for array in numbers if array.nbytes)):
        _until(channel, deadline)
        channel.sendall(part)


def receive(channel, deadline=None):
    """The next frame as (object, arrays). Raises Closed at the end, Broken for anything that is no frame, TimeoutError after `deadline`
    (of time.monotonic) or as the socket does.
    """
    length, size = _LENGTHS.unpack(_exactly(channel, _LENGTHS.size, deadline))
    if length > HEAD or size > ARRAYS:
        raise Broken(f"a frame of {length} + {size} bytes is more than is allowed")
    data = _exactly(channel, length, deadline)
    try:
        head = loads(data.decode())
        layout, texts = head.pop("arrays"), head.pop("texts")
        if len(layout) + len(texts) > ENTRIES:
            raise ValueError
        kinds = [(str(name), np.dtype(dtype) if dtype in DTYPES else None, tuple(int(n) for n in shape)) for name, dtype, shape in layout]
        if any(dtype is None or min(shape, default=0) < 0 for _, dtype, shape in kinds):
            raise ValueError
        if sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in kinds) != size:
            raise ValueError
        arrays, room = {}, ARRAYS
        for name, (shape, words) in texts.items():
            arrays[str(name)] = _texts(shape, words, room)
            room -= arrays[str(name)].nbytes
        for _, dtype, shape in kinds:   # numpy has limits of its own: of dimensions, and of sizes beside a zero
            np.broadcast_to(np.zeros((), dtype), shape)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError):
        raise Broken("what came is no frame") from None
    for name, dtype, shape in kinds:
        arrays[name] = np.frombuffer(_exactly(channel, math.prod(shape) * dtype.itemsize, deadline), dtype).reshape(shape)
    return head, arrays


def _texts(shape, words, room):
    """An array of texts, of at most `room` bytes: numpy gives each of them as much as the longest takes, 4 bytes a character."""
    words = [str(word) for word in words]
    if 4 * max(map(len, words), default=0) * len(words) > room:
        raise ValueError
    return np.array(words, dtype=str).reshape([int(n) for n in shape])


def loads(text):
    """A JSON value without halves of surrogate pairs, which JSON can say (as \\ud800) and no file can hold."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def _until(channel, deadline):
    if deadline is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for this frame is over")
        channel.settimeout(left)


def _exactly(channel, size, deadline=None):
    data, got = bytearray(size), 0
    view = memoryview(data)
    while got < size:
        _until(channel, deadline)
        count = channel.recv_into(view[got:])
        if count == 0:
            raise Closed("the other side is gone")
        got += count
    return data
