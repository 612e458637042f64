"""The channel carries plain arrays and texts, and whatever else comes through it is one of three exceptions, in little memory and in time."""
import json
import random
import socket
import struct
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from autograder import wire


class Recorded:
    """A channel whose other side sent these bytes, and went away."""

    def __init__(self, data=b""):
        self.data = bytearray(data)

    def sendall(self, part):
        self.data += part

    def recv_into(self, view):
        count = min(len(view), len(self.data), 1000)
        view[:count] = self.data[:count]
        del self.data[:count]
        return count


def frame(head, numbers=b""):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("!II", len(text), len(numbers)) + text + numbers


def received(data):
    """What came, or the exception that came instead; any but the three that are foreseen goes on."""
    try:
        return wire.receive(Recorded(data))
    except (wire.Broken, TimeoutError) as e:
        return e


plain = st.dictionaries(st.text(max_size=8), st.one_of(
    arrays.arrays(st.sampled_from(sorted(wire.DTYPES)), arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    arrays.arrays("U5", arrays.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3), elements=st.text("aé∂😀 <", max_size=5))), max_size=4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(plain)
def test_arrays_come_as_they_went(sent):
    channel = Recorded()
    wire.send(channel, {"outputs": "coupling"}, sent)
    head, got = wire.receive(channel)
    assert head == {"outputs": "coupling"} and not channel.data and got.keys() == sent.keys()
    for name, value in sent.items():
        assert got[name].shape == value.shape and got[name].dtype.kind == value.dtype.kind
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("value", (np.array([{}], dtype=object), np.array([1j]), np.zeros(3, "M8[s]"), np.zeros(wire.ARRAYS + 1, "uint8"), np.zeros(2, "f2"),
                                   np.array("x" * wire.HEAD)))
def test_what_it_does_not_carry(value):
    with pytest.raises(ValueError):
        wire.send(Recorded(), {}, {"a": value})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=300), st.builds(frame, st.binary(max_size=60), st.binary(max_size=20))))
def test_random_bytes(data):
    assert isinstance(received(data), (wire.Broken, tuple))


values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["float32", "a", -1, 0, 1, 2**63, 10**400])),
                      lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=8)
layouts = st.lists(st.one_of(values, st.tuples(values, st.one_of(values, st.sampled_from(sorted(wire.DTYPES))), st.one_of(values, st.lists(values, max_size=4)))), max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({"arrays": st.one_of(values, layouts), "texts": st.one_of(values, st.dictionaries(st.text(max_size=3), st.tuples(values, values), max_size=3))}),
       st.binary(max_size=40))
def test_frames_that_nobody_would_send(head, numbers):
    assert isinstance(received(frame(head, numbers)), (wire.Broken, tuple))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(plain, st.integers(0, 10**6))
def test_mutated_frames(sent, seed):
    """A byte changed, the end cut off: 40 ways for each frame, drawn here, since drawing the frame is what takes long."""
    channel, draw = Recorded(), random.Random(seed)
    wire.send(channel, {"outputs": "coupling"}, sent)
    for _ in range(40):
        data = bytearray(channel.data)
        data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.5:
            del data[len(data) - min(draw.randrange(40), len(data) // 2):]
        assert isinstance(received(data), (wire.Broken, tuple))


@pytest.mark.parametrize("data", (
    frame({"arrays": [], "texts": {"a": [[100_001], ["x" * 400_000] + [""] * 100_000]}}),
    frame({"arrays": [], "texts": {str(i): [[1001], ["x" * 3000] + [""] * 1000] for i in range(900)}}),
    frame({"arrays": [["a", "float64", [1 << 40]]], "texts": {}}), frame({"arrays": [["a", "float64", [0, 1 << 62, 1 << 62]]], "texts": {}}),
    frame({"arrays": [["a", "uint8", [1] * 200]], "texts": {}}, b"x"), struct.pack("!II", 2**32 - 1, 0), struct.pack("!II", 2, 2**32 - 1) + b"{}",
    frame(b"[" * 1_000_000), frame(b'{"a":' * 100_000), frame({"arrays": [["a", "uint8", [0]]] * 2000, "texts": {}}),
))
def test_no_frame_costs_more_memory_than_is_allowed(data):
    tracemalloc.start()
    try:
        said = received(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(said, wire.Broken) and peak < wire.ARRAYS + 5 * wire.HEAD, "the JSON as bytes, text and lists, and the arrays"


def test_half_a_surrogate_pair_can_be_written_afterwards():
    head, got = received(frame(rb'{"arrays": [], "texts": {"a\udc00": [[2], ["\ud800", "\ud83d\ude00"]]}, "x": {"\udfff": ["\uD800"]}}'))
    assert head == {"x": {"?": ["?"]}} and got["a?"].tolist() == ["?", "😀"]
    assert isinstance(received(frame(b'{"arrays": [], "texts": {}, "x": "\xed\xa0\x80"}')), wire.Broken)


def test_the_end():
    assert received(b"").closed and received(frame({"arrays": [], "texts": {}})[:-1]).closed
    assert not received(frame(b"{}")).closed


def test_a_deadline_holds_for_the_whole_frame():
    """One byte now and then, and the time limit of the socket alone would begin anew with each."""
    ours, theirs = socket.socketpair()

    def drip():
        try:
            for byte in struct.pack("!II", 1000, 0) + b" " * 1000:
                theirs.send(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            pass    # this side is gone

    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    with ours, pytest.raises(TimeoutError):
        wire.receive(ours, start + 0.3)
    assert time.monotonic() - start < 2
    thread.join()
    theirs.close()


def test_a_deadline_holds_for_a_reader_that_does_not_read():
    ours, theirs = socket.socketpair()
    start = time.monotonic()
    with ours, theirs, pytest.raises(TimeoutError):
        wire.send(ours, {}, {str(i): np.zeros(10**6, "float32") for i in range(3)}, start + 0.3)
    assert time.monotonic() - start < 2
