"""One submission in a confined child of a warm parent: its cells run in order, and what the probes sent is collected.

Nothing here decides anything. `run` says what happened to each cell and hands over the arrays of each check; the judge reads them
afterwards. This side leads: it sends one cell at a time, with the inputs of a check only to its own cell, and takes that check's
outputs from that cell only, once. Frames (wire.py) are plain numbers and texts, capped in size; clocks are this side's.
"""
import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import nbformat
import numpy as np

from autograder import sandbox, wire

ROOT = Path(__file__).resolve().parent.parent
GRACE = 3.0         # seconds for a cell to end after its time is over
START = 20.0        # seconds for a child to confine itself
WALL = 5            # a submission may take so many times a cell's time in all
OUTPUT = 20_000     # characters of one output that are kept
OUTPUTS = 100       # outputs of one cell
KEPT = 20_000_000   # characters of all outputs of a notebook
PICTURE = 2_000_000
TRIES = 3           # a submission is begun again when the warm parent is lost, as when memory runs out
FRAMES = 200        # from one cell: a check sends one, and every cell one at its end
RIVALS = ("zuko", "nflows", "normflows", "FrEIA", "pyro")   # other people's flows, where the tests need them: no answer either
PLACES = ("/tmp", "/mnt", "/media", "/srv")   # where a child's own file system in memory may be mounted
STUDENTS_SIDE = ("__init__.py", "check.py", "memory.py", "files.py", "warm.py", "wire.py", "sandbox.py", "probes")
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")}


class RunnerError(RuntimeError):
    """The grader's own machinery failed, in one sentence."""


@dataclass
class Event:
    """What happened to a cell: `kind` is ok, error, timeout, killed or skipped; `text` a sentence about it."""

    kind: str
    text: str = ""


@dataclass
class Run:
    events: dict = field(default_factory=dict)  # cell id -> Event
    arrays: dict = field(default_factory=dict)  # exercise -> outputs of its probe
    unusable: dict = field(default_factory=dict)  # exercise -> why its outputs could not be read
    seconds: float = 0.0


def checks(nb):
    """Cell id -> exercise of the check cells."""
    return {c.id: c.metadata.nbgrader.grade_id.removesuffix("_check") for c in nb.cells if "check" in c.metadata.get("tags", [])}


# --- the warm parent, from outside -----------------------------------------------------------------------------------

class Parent:
    """A warm parent (autograder.warm) and its one child at a time. `without`: the layers of confinement that this machine lacks."""

    def __init__(self, without=()):
        self.without = tuple(without)
        self.process = self.control = None

    def start(self):
        ours, theirs = socket.socketpair()
        keep = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "MPLCONFIGDIR", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
        environment = {k: os.environ[k] for k in keep if k in os.environ} | THREADS | {
            "PYTHONPATH": str(ROOT), "FLOWKIT_FAST": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-m", "autograder.warm", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                                            env=environment, cwd=ROOT, stdin=subprocess.DEVNULL)
        self.control = ours
        ours.settimeout(120)
        if "ready" not in self._answer():
            raise RunnerError("the warm parent did not start")
        ours.settimeout(30)

    def _answer(self):
        data = b""
        while not data.endswith(b"\n"):
            part = self.control.recv(1 << 16)
            if not part:
                raise RunnerError("the warm parent is gone")
            data += part
        return json.loads(data)

    def _ask(self, request, handles=()):
        try:
            socket.send_fds(self.control, [json.dumps(request).encode() + b"\n"], list(handles))
            return self._answer()
        except (OSError, ValueError) as e:
            self.close()
            raise RunnerError(f"the warm parent does not answer ({type(e).__name__}: {e})") from None

    @contextlib.contextmanager
    def child(self, policy, blocked, seed):
        """A fresh confined child; yields its channel. Whatever it started is gone afterwards."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.start()
        ours, theirs = socket.socketpair()
        environment = THREADS | {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "FLOWKIT_FAST": "1", "AUTOGRADER_CHANNEL": "outside",
                                 "AUTOGRADER_SEED": str(seed), "MPLBACKEND": "Agg", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        order = {"policy": asdict(policy), "without": self.without, "blocked": list(blocked), "seed": seed, "environment": environment}
        with ours:
            with theirs:
                pid = self._ask({"fork": order}, [theirs.fileno()])["pid"]
            try:
                try:
                    head, _ = wire.receive(ours, time.monotonic() + START)
                except (OSError, wire.Broken) as e:     # too slow, or gone
                    raise RunnerError(f"a child did not begin ({e})") from None
                if "ready" not in head:
                    raise RunnerError(f"a child could not be confined: {head.get('failed', head)}")
                yield ours
            finally:
                self._ask({"end": pid})

    def close(self):
        if self.control is not None:
            self.control.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.control = None


@cache
def readable(blocked):
    """(files and folders that a student's code may read, folders that it may only list): Python and its packages, the course's data and
    what is left of flowkit and autograder without the references and the judge's side. `blocked`: a tuple of modules.
    """
    paths = sysconfig.get_paths()
    hidden = {ROOT}
    for folder in {Path(paths[name]).resolve() for name in ("purelib", "platlib")}:
        hidden |= {p.resolve() for p in folder.iterdir() if p.name.startswith(("flowkit", "autograder", "__editable__.flowkit", *RIVALS))}
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/fonts", "/dev/urandom", "/dev/random")
    read, listed = set(), {ROOT, ROOT / "flowkit", ROOT / "autograder", ROOT / "data"}
    for place in (*system, sys.prefix, sys.base_prefix, paths["purelib"], paths["platlib"]):
        around(Path(place).resolve(), hidden, read, listed)
    answers = {b.removeprefix("flowkit.").split(".")[0] for b in blocked if b.startswith("flowkit.")} | {"__pycache__"}
    read |= {p for p in (ROOT / "flowkit").iterdir() if p.stem not in answers}
    read |= {p for p in (ROOT / "data").iterdir() if "sample_class" not in p.name}
    read |= {ROOT / "autograder" / name for name in STUDENTS_SIDE}
    return tuple(sorted(map(str, read))), tuple(sorted(map(str, listed)))


def around(place, hidden, read, listed):
    """Add to `read` what lies at `place` without what is `hidden` below it, as few entries as do, and to `listed` the folders between.

    A place may lie in a hidden folder, as an environment in the course's. Links are followed: lib64 is often one to lib.
    """
    if place in read or place in listed or place in hidden:
        return
    if not any(place in h.parents for h in hidden):
        read.add(place)
        return
    listed.add(place)
    for entry in place.iterdir():
        around(entry.resolve(), hidden, read, listed)


def mount_point():
    """A folder over which a child may mount a file system of its own, unseen by others: one that holds nothing that it needs. None if
    there is none. Nothing has to be made for it, so nothing stays if the grader is killed.
    """
    needed = [Path(p).resolve() for p in (ROOT, sys.prefix, sys.base_prefix)]
    return next((p for p in PLACES if Path(p).is_dir() and not any(Path(p) in (n, *n.parents) for n in needed)), None)


# --- one submission --------------------------------------------------------------------------------------------------

def run(nb, inputs, seed, blocked=(), timeout=60, parent=None):
    """Run the notebook (its outputs are written into it) and return a Run.

    `inputs`: exercise -> dict of arrays; `blocked`: modules that cannot be imported; `timeout`: seconds for one cell; `parent`: the warm
    parent to fork from, one of its own if None.
    """
    start, blocked = time.monotonic(), (*blocked, *RIVALS)
    with contextlib.ExitStack() as stack:
        if parent is None:
            parent = Parent()
            stack.callback(parent.close)
        scratch = None if "namespaces" in parent.without else mount_point()
        if scratch is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True))
        scratch = Path(scratch).resolve()
        read, listed = readable(tuple(blocked))
        policy = sandbox.Policy(str(scratch), read, listed, seconds=int(WALL * timeout + START))
        for tried in range(1, TRIES + 1):
            result = Run()
            try:
                with parent.child(policy, blocked, seed) as channel:
                    Session(nb, inputs, timeout, channel, result).run()
                break
            except RunnerError:
                if tried == TRIES:
                    raise
        clean(nb, scratch)
        for arrays in result.arrays.values():
            for key, value in arrays.items():
                if value.dtype.kind == "U":
                    arrays[key] = np.array([scrub(str(v), scratch) for v in value.ravel()]).reshape(value.shape)
        for event in result.events.values():
            event.text = scrub(event.text, scratch)
    result.seconds = time.monotonic() - start
    return result


class Session:
    """The cells of one notebook, given one by one to a child; what it says is believed for this cell only, and only so far as it must be."""

    def __init__(self, nb, inputs, timeout, channel, result):
        self.nb, self.inputs, self.timeout, self.channel, self.result = nb, inputs, timeout, channel, result
        self.check_of = checks(nb)
        self.end = time.monotonic() + WALL * timeout
        self.room = KEPT

    def run(self):
        """Every code cell but those tagged `show`; when the child is gone, the rest are killed, and when the time is over, they have none."""
        dead = ""
        for cell in self.nb.cells:
            if cell.cell_type != "code" or not cell.source.strip() or "show" in cell.metadata.get("tags", []):
                continue
            cell.outputs, cell.execution_count = [], 1
            if dead or time.monotonic() > self.end:
                over = f"an earlier cell left no time: a notebook may take {WALL * self.timeout:g} seconds in all"
                self.result.events[cell.id] = Event("killed", dead) if dead else Event("timeout", over)
                continue
            event, dead = self.one(cell)
            self.result.events[cell.id] = event
            if event.kind in ("timeout", "killed"):
                cell.outputs.append(error(event.kind.capitalize(), event.text))

    def one(self, cell):
        """(event, why the child is lost or ""), with the cell's outputs written."""
        exercise = self.check_of.get(cell.id)
        seconds = min(self.timeout, max(self.end - time.monotonic(), 0.1))
        order = {"cell": cell.id, "source": cell.source, "seconds": seconds, "check": exercise}
        deadline = time.monotonic() + seconds + GRACE
        try:
            try:
                wire.send(self.channel, order, self.inputs.get(exercise), deadline)
            except ValueError as e:     # before anything was sent
                return Event("error", f"this cell cannot be run: {e}"), ""
            for _ in range(FRAMES):
                head, arrays = wire.receive(self.channel, deadline)
                if head.get("done") == cell.id:
                    return self.outcome(cell, head)
                if exercise and head.get("outputs") == exercise and exercise not in self.result.arrays:
                    self.result.arrays[exercise] = arrays
            raise wire.Broken("too many frames")
        except TimeoutError:
            return Event("timeout", f"stopped after {seconds:.3g} seconds"), "an earlier cell took too long and could not be interrupted"
        except (wire.Closed, ConnectionError):
            return Event("killed", "the process died while this cell ran"), "an earlier cell had brought the process down"
        except wire.Broken as e:
            if exercise:
                self.result.unusable[exercise] = f"the outputs could not be read: {e}"
            return Event("killed", f"the channel was disturbed ({e})"), "an earlier cell had disturbed the channel"

    def outcome(self, cell, head):
        try:
            cell.outputs = [nbformat.from_dict(o) for o in head["outputs"][:OUTPUTS]]
            for output in cell.outputs:
                nbformat.validate(output, "output", version=4)
            self.room -= sum(len(str(output)) for output in cell.outputs)
            if self.room < 0:
                cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text="(no more outputs of this notebook are kept)")]
            what = head["error"]
            if head["late"]:
                return Event("timeout", f"stopped after {self.timeout:.3g} seconds"), ""
            if what is None:
                return Event("ok"), ""
            name, text = str(what[0])[:100], " ".join(str(what[1])[:2000].split())[:300]
            if re.search("DefaultCPUAllocator|can't allocate memory|std::bad_alloc|Cannot allocate memory", text):
                name = "MemoryError"    # torch's and the system's words for it
            return Event("error", f"{name}: {text}" if text else name), ""
        except Exception:  # outputs that no notebook has: whatever sent them was not our side of the channel
            cell.outputs = []
            return Event("error", "this cell's outputs could not be read"), ""


_CODES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def error(name, text):
    return nbformat.from_dict({"output_type": "error", "ename": name, "evalue": text, "traceback": [f"{name}: {text}"]})


# --- outputs that can be shown to others -----------------------------------------------------------------------------

def scrub(text, scratch=None):
    """A text without the places of this machine, and without codes that colour it or move a terminal's cursor."""
    text = _CODES.sub("", text)
    if scratch is not None:
        text = re.sub(re.escape(str(scratch)) + r"/tmp/ipykernel_\d+/\d+\.py", "cell", text)
    for place, name in _places(scratch):
        if place in text:
            text = text.replace(place + os.sep, f"{name}/").replace(place, name)
    return text


@lru_cache(maxsize=8)
def _places(scratch):
    """[(place, what is said instead)], the longest first: the environment may lie inside the course's folder."""
    places = [(scratch, "."), (ROOT, "course"), (sys.prefix, "python"), (sysconfig.get_paths()["stdlib"], "python"), (Path.home(), "~")]
    return sorted(((str(p), name) for p, name in places if p is not None and len(str(p)) > 1), key=lambda p: -len(p[0]))


def clean(nb, scratch):
    """Keep texts and PNG pictures of the outputs, cut to size and without paths; no HTML, no scripts, no widgets."""
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in (cleaned(o, scratch) for o in cell.outputs) if o is not None]
    nb.metadata.pop("widgets", None)


def cleaned(output, scratch):
    def short(text):
        text = scrub(str(text), scratch)
        return text if len(text) <= OUTPUT else text[:OUTPUT] + f"\n... ({len(text)} characters in all)"

    if output.output_type == "stream":
        output.text = short(output.text)
    elif output.output_type == "error":
        output.ename, output.evalue = short(output.ename), short(output.evalue)
        output.traceback = [short(line) for line in output.traceback]
    else:
        data = {k: short(v) for k, v in output.data.items() if k == "text/plain"}
        picture = output.data.get("image/png")
        if isinstance(picture, str) and len(picture) <= PICTURE and png(picture):
            data["image/png"] = picture
        if not data:
            return None
        output.data, output.metadata = data, {}
    return output


def png(text):
    """Whether a text is a PNG in base64, as pages put it into an attribute."""
    try:
        return base64.b64decode(text.strip(), validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    except ValueError:
        return False
