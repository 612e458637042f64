"""One submission in a kernel of its own: its cells run in order, and what the probes left in the channel is collected.

Nothing here decides anything. `run` says what happened to each cell and hands over the arrays of each check; the judge
reads them afterwards. Arrays come through files that are read without pickle, capped in size, after the check's own
cell has run and before the next one starts, so no other cell can add to them.
"""
import asyncio
import json
import os
import re
import stat
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty

import numpy as np
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_async, run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 64_000_000  # bytes that one probe may leave
ENTRIES = 1000
GRACE = 5.0  # seconds for a kernel to come back after it was interrupted
OUTPUT = 20_000  # characters of one output that are kept
PICTURE = 2_000_000


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


def run(nb, inputs, seed, blocked=(), timeout=60):
    """Run the notebook (its outputs are written into it) and return a Run.

    `inputs`: exercise -> dict of arrays; `blocked`: modules that cannot be imported; `timeout`: seconds for one cell.
    """
    result, start = Run(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True) as scratch:
        scratch = Path(scratch).resolve()
        channel = scratch / "channel"
        for folder in ("channel", "work", "tmp", "ipython", "kernels/grading"):
            (scratch / folder).mkdir(parents=True)
        for exercise, arrays in inputs.items():
            np.savez(channel / f"{exercise}.in.npz", **arrays)
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "FLOWKIT_FAST": "1", "AUTOGRADER_CHANNEL": str(channel), "AUTOGRADER_SEED": str(seed), "AUTOGRADER_BLOCKED": ",".join(blocked),
            "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch / "tmp"), "IPYTHONDIR": str(scratch / "ipython"), "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        client = NotebookClient(
            nb, km=manager(scratch / "kernels"), timeout=timeout, interrupt_on_timeout=False, allow_errors=True, coalesce_streams=True,
            record_timing=False, startup_timeout=120, iopub_timeout=10, extra_arguments=["--HistoryManager.hist_file=:memory:", "--IPKernelApp.log_level=ERROR"],
        )
        client.log.setLevel("CRITICAL")  # a timeout or a dead kernel is a result here, not something to print
        try:
            with client.setup_kernel(cwd=str(scratch / "work"), env=environment):
                cells(client, nb, result, channel)
        finally:
            stop(client)
        clean(nb, scratch)
        for arrays in result.arrays.values():
            for key, value in arrays.items():
                if value.dtype.kind == "U":
                    arrays[key] = np.array([scrub(str(v), scratch) for v in value.ravel()]).reshape(value.shape)
        for event in result.events.values():
            event.text = scrub(event.text, scratch)
    result.seconds = time.monotonic() - start
    return result


def manager(folder):
    """A manager of kernels that start through autograder.kernel, which refuses the references."""
    spec = {"argv": [sys.executable, "-m", "autograder.kernel", "-f", "{connection_file}"], "display_name": "grading", "language": "python"}
    (folder / "grading" / "kernel.json").write_text(json.dumps(spec), "utf-8")
    specs = KernelSpecManager(kernel_dirs=[str(folder)], ensure_native_kernel=False)
    return AsyncKernelManager(kernel_name="grading", kernel_spec_manager=specs)


def cells(client, nb, result, channel):
    """Run every code cell but those tagged `show`; stop when the kernel is gone."""
    check_of, dead = checks(nb), ""
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or not cell.source.strip() or "show" in cell.metadata.get("tags", []):
            continue
        if dead:
            result.events[cell.id] = Event("killed", dead)
            continue
        exercise = check_of.get(cell.id)
        out = channel / f"{exercise}.out.npz"
        if exercise:
            out.unlink(missing_ok=True)  # left by a cell that is not this check's own
        try:
            client.execute_cell(cell, index)
            result.events[cell.id] = outcome(cell)
        except CellTimeoutError:
            result.events[cell.id] = Event("timeout", f"stopped after {client.timeout} seconds")
            cell.outputs.append(error("Timeout", f"this cell was stopped after {client.timeout} seconds"))
            if not recovered(client):
                dead = "an earlier cell took too long and could not be interrupted, so the kernel was stopped"
        except DeadKernelError:
            result.events[cell.id] = Event("killed", "the kernel died while this cell ran")
            cell.outputs.append(error("DeadKernel", "the kernel died while this cell ran"))
            dead = "an earlier cell had brought the kernel down"
        if exercise and os.path.lexists(out):
            try:
                result.arrays[exercise] = load(out)
            except ValueError as e:
                result.unusable[exercise] = str(e)


def error(name, text):
    import nbformat

    return nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])


def outcome(cell):
    """ok, or the error that the cell ended with."""
    for output in cell.outputs:
        if output.output_type == "error":
            text = " ".join(str(output.evalue).split())
            return Event("error", f"{output.ename}: {text[:300]}" if text else output.ename)
    return Event("ok")


async def _recovered(client):
    await ensure_async(client.km.interrupt_kernel())
    wanted, end = client.kc.kernel_info(), time.monotonic() + GRACE
    while time.monotonic() < end:
        try:
            message = await ensure_async(client.kc.get_shell_msg(timeout=0.5))
        except Empty:
            if not await ensure_async(client.km.is_alive()):
                return False
            continue
        if message["parent_header"].get("msg_id") == wanted:
            return True
    await ensure_async(client.km.shutdown_kernel(now=True))
    return False


recovered = run_sync(_recovered)  # whether the kernel listens again after an interrupt; if not, it is stopped


async def _stop(client):
    pending = asyncio.all_tasks() - {asyncio.current_task()}  # a cell that an interrupt cut off is still being waited for
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    if client.kc is not None:
        client.kc.stop_channels()
    if client.km is not None and client.km.has_kernel:
        await ensure_async(client.km.shutdown_kernel(now=True))


stop = run_sync(_stop)


def load(path):
    """The arrays that a probe left: plain numbers and texts only, never pickle. ValueError says what is wrong."""
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode) or info.st_size > LARGEST_FILE:
        raise ValueError("the outputs are no plain file of a sensible size")
    try:
        with np.load(path, allow_pickle=False) as file:
            members = file.zip.infolist()
            if len(members) > ENTRIES or sum(m.file_size for m in members) > LARGEST_FILE:
                raise ValueError("too much")
            arrays = {name: file[name] for name in file.files}
    except Exception as e:  # bytes that are no npz file make numpy and zipfile raise all sorts of things
        raise ValueError(f"the outputs could not be read ({type(e).__name__})") from None
    if any(a.dtype.kind not in "fiubU" for a in arrays.values()):
        raise ValueError("the outputs hold something else than numbers and texts")
    return arrays


# --- outputs that can be shown to others -----------------------------------------------------------------------------

def scrub(text, scratch=None):
    """A text without the places of this machine."""
    places = [(scratch, "."), (ROOT, "course"), (sys.prefix, "python"), (sysconfig.get_paths()["stdlib"], "python"), (Path.home(), "~")]
    if scratch is not None:
        text = re.sub(re.escape(str(scratch)) + r"/tmp/ipykernel_\d+/\d+\.py", "cell", text)
    # The longest first: the environment may lie inside the course's folder.
    for place, name in sorted((p for p in places if p[0] is not None and len(str(p[0])) > 1), key=lambda p: -len(str(p[0]))):
        text = text.replace(str(place) + os.sep, f"{name}/").replace(str(place), name)
    return text


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
        if isinstance(picture, str) and len(picture) <= PICTURE:
            data["image/png"] = picture
        if not data:
            return None
        output.data, output.metadata = data, {}
    return output
