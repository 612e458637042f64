"""Each layer of the sandbox does its part: with it an attempt fails, and without it the same attempt wins."""
import ctypes
import errno
import mmap
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest

from autograder import sandbox

libc = ctypes.CDLL(None, use_errno=True)
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", sys.prefix, sys.base_prefix)
NO_RESERVE = 0x4000


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return str(tmp_path / "scratch")


def inside(attempt, scratch, without=(), **policy):
    """What attempt() returned in a confined child, as text, or the name of what it raised."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        said = "not confined"
        try:
            sandbox.enter(sandbox.Policy(scratch, SYSTEM, **policy), without)
            try:
                said = str(attempt())
            except BaseException as e:
                said = errno.errorcode.get(getattr(e, "errno", None), type(e).__name__)
        finally:
            os.write(send, said.encode())
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return said


def call(name, *arguments):
    """A call of the C library that succeeds or raises OSError."""
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
    return "won"


def test_this_machine_has_them_all():
    assert sandbox.missing() == {}


# --- an attempt, the layers that stand against it, and the attempt itself, made for the folder `place` -----------------

def reads_a_neighbour(place):
    (place / "neighbour.txt").write_text("won")
    return lambda: open(place / "neighbour.txt").read()


def writes_beside(place):
    return lambda: open(place / "mine.txt", "w").write("x") and "won"


def sees_the_grader(place):
    pid = os.getpid()
    return lambda: "won" if os.path.exists(f"/proc/{pid}") else "hidden"


def sends_a_datagram(place):
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind(("127.0.0.1", 0))
    return lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", listener.getsockname()) and "won"


def connects(place):
    listener = socket.create_server(("127.0.0.1", 0))
    return lambda: socket.create_connection(listener.getsockname(), 5) and "won"


def signals_the_grader(place):
    pid = os.getpid()
    return lambda: os.kill(pid, 0) or "won"


def takes_memory(place):
    return lambda: len(mmap.mmap(-1, 64 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)) and "won"


def writes_a_large_file(place):
    def attempt():
        with open("large", "wb", buffering=0) as file:
            file.truncate(3 << 20)
        return "won"
    return attempt


def fills_the_disk(place):
    def attempt():
        for i in range(8):
            with open(f"file-{i}", "wb") as file:
                file.write(bytes(1 << 20))
        return "won"
    return attempt


def traces(place):
    return lambda: call("ptrace", 0, 0, 0, 0)


def makes_a_namespace(place):
    return lambda: call("unshare", 0x10000000)


def takes_memory_without_a_name(place):
    return lambda: os.memfd_create("x") and "won"


def takes_memory_that_stays(place):
    return lambda: call("shmget", 0, 1 << 20, 0o1600)


def gets_rid_of_the_signal(place):
    return lambda: call("prctl", 1, 0, 0, 0, 0)


def has_capabilities(place):
    return lambda: next("none" if int(line.split()[1], 16) == 0 else "won" for line in open("/proc/self/status") if line.startswith("CapEff"))


ATTEMPTS = {
    reads_a_neighbour: ("landlock",), writes_beside: ("landlock", "namespaces"), sees_the_grader: ("namespaces",),
    signals_the_grader: ("namespaces", "landlock"), sends_a_datagram: ("namespaces",), connects: ("namespaces", "landlock"),
    takes_memory: ("limits",), writes_a_large_file: ("limits",), fills_the_disk: ("namespaces",),
    traces: ("seccomp",), makes_a_namespace: ("seccomp",), takes_memory_without_a_name: ("seccomp",),
    takes_memory_that_stays: ("seccomp",), gets_rid_of_the_signal: ("seccomp",),
}


OF_NEW_LANDLOCK = (signals_the_grader, connects)    # what Landlock refuses since its fourth and sixth version, and namespaces everywhere


@pytest.mark.parametrize("make", ATTEMPTS)
def test_an_attempt_fails_and_wins_only_without_its_layers(make, scratch, tmp_path):
    layers, attempt = ATTEMPTS[make], make(tmp_path)
    policy = {"memory": 48 << 30, "file_size": 2 << 20, "disk": 4 << 20}
    assert inside(attempt, scratch, **policy) not in ("won", "not confined")
    for layer in layers if len(layers) > 1 else ():     # each holds if the other fails
        if layer == "namespaces" and make in OF_NEW_LANDLOCK and sandbox.landlock_version() < 6:
            continue
        assert inside(attempt, scratch, [layer], **policy) not in ("won", "not confined"), layer
    assert inside(attempt, scratch, layers, **policy) == "won", "a test that cannot fail"


def test_what_it_starts_is_confined_too(scratch, tmp_path):
    (tmp_path / "neighbour.txt").write_text("a secret")
    def attempt():
        return subprocess.run(["/bin/sh", "-c", f"cat {tmp_path}/neighbour.txt; kill -9 {os.getppid()}; echo $?"], capture_output=True, text=True).stdout
    assert "a secret" not in inside(attempt, scratch)
    assert "a secret" in inside(attempt, scratch, ["landlock"])


def test_what_a_student_needs_works(scratch):
    def attempt():
        import tempfile
        import threading
        with open("mine.txt", "w") as file:
            file.write("x" * 1000)
        os.mkdir("folder")
        os.rename("mine.txt", "folder/mine.txt")
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(b"x")
        thread = threading.Thread(target=lambda: None)
        thread.start(), thread.join()
        assert subprocess.run(["/bin/sh", "-c", "exit 3"]).returncode == 3
        assert open("/dev/null", "w").write("x") and os.listdir("/proc/self/task")
        return os.getcwd(), os.getpid(), os.getppid(), int(open("/proc/self/oom_score_adj").read())
    assert inside(attempt, scratch) == f"('{scratch}', 1, 0, 1000)"
    assert os.listdir(scratch) == [], "its files were in memory, and are gone"


def test_no_capability_is_left(scratch):
    assert inside(has_capabilities(None), scratch) == "none"


@pytest.mark.parametrize("end", (signal.SIGTERM, "the parent's end"))
def test_nothing_outlives_the_one_who_waits(scratch, end):
    """Not even what got rid of the signal that comes with a parent's end (here without seccomp, which forbids it), or shot at its own group."""
    (receive, send), (tell, told) = os.pipe(), os.pipe()
    middle = os.fork()
    if middle == 0:
        os.setsid()
        waits = os.fork()
        if waits == 0:
            sandbox.die_with_parent()
            sandbox.enter(sandbox.Policy(scratch, SYSTEM), ["seccomp"])
            libc.prctl(1, 0, 0, 0, 0)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            if second := os.fork():
                while os.getpgid(second) == os.getpgrp():
                    time.sleep(0.01)
                os.kill(0, signal.SIGKILL)  # the first of a namespace survives its own shot, and the one who waits would not, were it reached
            else:
                os.setsid()
            os.write(send, b"x")
            time.sleep(60)
            os._exit(0)
        os.write(told, struct.pack("i", waits))
        os.close(send)
        os.waitpid(waits, 0)
        os.write(told, b"ended")
        os._exit(0)
    os.close(send), os.close(told)
    (waits,) = struct.unpack("i", os.read(tell, 4))
    said = b""
    while len(said) < 2:
        said += os.read(receive, 2)
    os.kill(*((waits, signal.SIGTERM) if end == signal.SIGTERM else (middle, signal.SIGKILL)))
    start = time.monotonic()
    assert os.read(receive, 1) == b"" and time.monotonic() - start < 10, "all that had the pipe open are gone"
    os.waitpid(middle, 0)
    assert os.read(tell, 5) == (b"ended" if end == signal.SIGTERM else b"")
    os.close(receive), os.close(tell)


def test_what_is_missing_is_said(monkeypatch):
    def refused():
        raise PermissionError(errno.EPERM, "unshare: Operation not permitted")
    monkeypatch.setattr(sandbox, "leave_namespaces", refused)
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    found = sandbox.missing()
    assert found.keys() == {"namespaces", "landlock"}
    assert "unshare: Operation not permitted" in found["namespaces"] and "max_user_namespaces" in found["namespaces"]
    assert "this kernel has no Landlock" in found["landlock"] and "5.13" in found["landlock"]
    monkeypatch.setattr(sandbox, "_libc", None)
    assert sandbox.missing().keys() == {"namespaces", "landlock", "seccomp"}


# --- the filter of system calls, run on paper: also for the machine that is not this one --------------------------------

def verdict(program, architecture, number, argument=0):
    data = struct.pack("IIQQ", number, architecture, 0, argument)
    place = value = 0
    while True:
        code, yes, no, k = program[place]
        place += 1
        if code == 0x20:
            (value,) = struct.unpack_from("I", data, k)
        elif code == 0x06:
            return k
        else:
            place += yes if {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code] else no


@pytest.mark.parametrize("machine", ("x86_64", "aarch64"))
def test_the_filter(machine, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = sandbox._program()
    assert all(yes < 256 and no < 256 for _, yes, no, _ in program)
    column, architecture, clone, clone3, prctl = sandbox._MACHINES[machine]
    refused = {n[column] for n in sandbox.DENIED.values()}
    allowed, eperm, enosys = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS

    def said(number, argument=0, architecture=architecture):
        # the first argument lies at byte 16, after number, architecture and the instruction's address
        return verdict(program, architecture, number, argument)

    for number in set(range(460)) - {clone3}:
        assert said(number) == (eperm if number in refused else allowed), number
    assert said(clone3) == enosys
    assert said(clone, signal.SIGCHLD) == allowed
    assert all(said(clone, flag | signal.SIGCHLD) == eperm for flag in sandbox._NEW.values())
    assert said(prctl, 1) == eperm and said(prctl, 15) == allowed
    assert said(0, architecture=0x40000003) == eperm and said(1 << 30) == eperm
