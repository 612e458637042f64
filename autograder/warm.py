"""The warm parent: a process that has torch and the probes imported, and forks a confined child for each submission.

`python -m autograder.warm FD` is started by the grader with one end of a socket pair, and holds nothing that decides: no
reference, no misconception, no tolerance, no secret in its environment, and one thread only, so that forking is sound. It answers two
requests, {"fork": ...} with a channel handed over, and {"end": pid}; when the socket closes, it ends and its children with it.

The child (`serve`) confines itself, then runs the cells that come through its channel on an ordinary IPython shell and sends back
what they left. It decides nothing: its answers are taken for what a student's code says.
"""
import contextlib
import gc
import json
import os
import random
import signal
import socket
import sys
import tempfile
import traceback

from autograder import sandbox, wire

CHANNEL = 3         # the file descriptor of the channel in a child
STREAM = 20_000     # characters of one stream that are kept
PICTURE = 2_000_000
OUTPUTS = 100


class Late(KeyboardInterrupt):
    """A cell's time is over; a KeyboardInterrupt, since that passes through everything that catches errors."""


class Refuse:
    """A finder that stands before all others and refuses some modules, and what lies below them."""

    def __init__(self, names):
        self.names = tuple(names)

    def find_spec(self, name, path=None, target=None):
        if any(name == n or name.startswith(n + ".") for n in self.names):
            error = ImportError(f"{name} holds the answers of this lesson and cannot be used in a graded answer")
            error.reference_blocked = True  # so that a probe can tell this from a missing package
            raise error
        return None


# --- the parent ------------------------------------------------------------------------------------------------------

def preload():
    """Import what every submission needs, and make the shell."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot  # noqa: F401
    import numpy  # noqa: F401
    import torch
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    import autograder.check
    from autograder import probes
    from flowkit import datasets, plotting, settings, toys  # noqa: F401

    probes.table()
    torch.set_num_threads(1)
    # The first optimiser of a process has torch import its compiler, which takes longer than a whole submission.
    weight = torch.ones(2, 2, requires_grad=True)
    weight.sum().backward()
    torch.optim.Adam([weight]).step()
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    config.InteractiveShell.xmode = "Plain"     # Python's own traceback: the lines around each frame take half a second to find
    with tempfile.TemporaryDirectory() as place:    # the shell insists on a profile, and writes no more into it
        config.InteractiveShell.ipython_dir = place
        InteractiveShell.instance(config=config)


def main():
    control = socket.socket(fileno=int(sys.argv[1]))
    sandbox.die_with_parent()
    with contextlib.suppress(BlockingIOError):
        if not control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            return      # it ended before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the grader hears an interrupt, and ends this process in its own time
    preload()
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads != 1:
        raise RuntimeError(f"the warm parent has {threads} threads; forking would leave locks behind")
    gc.collect(), gc.disable(), gc.freeze()
    ends = {}   # child -> the signal that ends it and all it started
    answer(control, {"ready": os.getpid()})
    while True:
        data, handles = b"", []
        while not data.endswith(b"\n"):
            part, new, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not part:
                return
            data, handles = data + part, handles + new
        request = json.loads(data)
        if "fork" in request:
            pid = os.fork()
            if pid == 0:
                control.close()
                child(request["fork"], handles[0])
            os.close(handles[0])
            # With a namespace of its own the child is the one who waits outside, and kills what is inside when it is told to end.
            ends[pid] = signal.SIGKILL if "namespaces" in request["fork"]["without"] else signal.SIGTERM
            answer(control, {"pid": pid})
        else:
            os.kill(request["end"], ends.pop(request["end"]))   # not waited for so far, so it is still there, be it as a zombie
            _, status = os.waitpid(request["end"], 0)
            answer(control, {"status": os.waitstatus_to_exitcode(status)})


def answer(control, value):
    control.sendall(json.dumps(value).encode() + b"\n")


# --- the child -------------------------------------------------------------------------------------------------------

def child(order, handle):
    """From fork to the end of this process, which never comes back to the parent's code."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        os.dup2(handle, CHANNEL)
        os.closerange(CHANNEL + 1, 1 << 12)
        sandbox.die_with_parent()
        channel = socket.socket(fileno=CHANNEL)
        try:
            policy = sandbox.Policy(**{**order["policy"], "read": tuple(order["policy"]["read"]), "listed": tuple(order["policy"]["listed"])})
            sandbox.enter(policy, order["without"])
            settle(order, policy.scratch)
        except Exception as e:
            wire.send(channel, {"failed": f"{type(e).__name__}: {e}"})
        else:
            wire.send(channel, {"ready": os.getpid()})
            serve(channel)
            code = 0
    except wire.Closed:
        code = 0
    except BaseException:
        with contextlib.suppress(BaseException):
            wire.send(channel, {"failed": traceback.format_exc()[-2000:]})
    finally:
        os._exit(code)


def settle(order, scratch):
    """A clean environment, fresh seeds, and the references refused."""
    import numpy
    import torch

    os.environ.clear()
    os.environ.update(order["environment"], HOME=scratch, TMPDIR=scratch, IPYTHONDIR=f"{scratch}/.ipython", MPLCONFIGDIR=f"{scratch}/.matplotlib")
    tempfile.tempdir = None     # the parent's own is remembered there
    loaded = [n for n in sys.modules if any(n == b or n.startswith(b + ".") for b in order["blocked"])]
    if loaded:
        raise RuntimeError(f"{', '.join(loaded)} must not be loaded before the student's code")
    sys.meta_path.insert(0, Refuse(order["blocked"]))
    sys.path[:] = [p for p in sys.path if p]
    sys.path.insert(0, "")
    random.seed(order["seed"]), numpy.random.seed(order["seed"] % 2**32), torch.manual_seed(order["seed"])
    gc.enable()     # what the parent made stays frozen: to look through it would cost more than the submission, and copy its memory


def serve(channel):
    """Run the cells that come, one after the other, until the channel closes."""
    from IPython.core.interactiveshell import InteractiveShell

    shell, checks = InteractiveShell.instance(), sys.modules["autograder.check"]   # autograder.check itself is the function
    while True:
        order, inputs = wire.receive(channel)
        said = Said(shell)
        checks.outside = Outside(channel, order.get("check"), inputs)
        with said, alarm(order["seconds"]):
            result = shell.run_cell(order["source"], store_history=False, cell_id=order["cell"])
        error = result.error_before_exec or result.error_in_exec
        late = isinstance(error, Late)
        if error is not None:
            said.add({"output_type": "error", "ename": type(error).__name__, "evalue": str(error)[:STREAM], "traceback": []})
        wire.send(channel, {"done": order["cell"], "late": late, "outputs": said.outputs,
                            "error": None if error is None else [type(error).__name__, str(error)[:2000]]})


@contextlib.contextmanager
def alarm(seconds):
    """Late is raised in the main thread after that many seconds of wall time."""
    def ring(*_):
        raise Late(f"stopped after {seconds:g} seconds")
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Outside:
    """The judge sits elsewhere: the probe runs here, on the inputs that came with the check's own cell, and its outputs are sent."""

    def __init__(self, channel, exercise, inputs):
        self.channel, self.exercise, self.inputs = channel, exercise, inputs

    def __call__(self, exercise, probe, objects):
        from autograder.check import Score, captured

        if exercise != self.exercise:
            return Score(0.0, 0.0, "<p>a check counts in its own cell only, once</p>")
        self.exercise = None
        with captured(frozen=True):
            arrays = probe(objects, self.inputs)
        wire.send(self.channel, {"outputs": exercise}, arrays)
        return Score(0.0, 0.0, "<p>recorded; the judge decides</p>")


class Said:
    """What a cell printed and displayed, as a notebook's outputs, cut to size."""

    def __init__(self, shell):
        self.shell, self.outputs = shell, []

    def add(self, output):
        if len(self.outputs) < OUTPUTS:
            self.outputs.append(output)

    def publish(self, data, metadata=None, **_):
        kept = {"text/plain": str(data.get("text/plain", ""))[:STREAM]}
        picture = data.get("image/png")
        if isinstance(picture, bytes):
            import base64
            picture = base64.b64encode(picture).decode()
        if isinstance(picture, str) and len(picture) <= PICTURE:
            kept["image/png"] = picture
        self.add({"output_type": "display_data", "data": kept, "metadata": {}})

    def clear_output(self, wait=False):
        self.outputs.clear()

    is_publishing = True

    def __enter__(self):
        self.before = self.shell.display_pub, sys.stdout, sys.stderr, sys.displayhook
        self.shell.display_pub = self
        sys.stdout, sys.stderr = Stream(self, "stdout"), Stream(self, "stderr")
        return self

    def __exit__(self, *_):
        self.shell.display_pub, sys.stdout, sys.stderr, sys.displayhook = self.before


class Stream:
    """A text stream that keeps its first characters."""

    encoding, errors, closed = "utf-8", "replace", False

    def __init__(self, said, name):
        self.said, self.name, self.size = said, name, 0

    def write(self, text):
        text = str(text)
        kept = text[:max(0, STREAM - self.size)]
        self.size += len(text)
        if kept:
            last = self.said.outputs[-1] if self.said.outputs else {}
            if last.get("name") == self.name:
                last["text"] += kept
            else:
                self.said.add({"output_type": "stream", "name": self.name, "text": kept})
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        pass

    def isatty(self):
        return False

    def writable(self):
        return True

    def readable(self):
        return False

    def fileno(self):
        return {"stdout": 1, "stderr": 2}[self.name]


if __name__ == "__main__":
    main()
