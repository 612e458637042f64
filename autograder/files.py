"""Files and commands: a file is either as it was or complete, written beside its place, flushed, and moved there in one step."""
import os
import sys
import tempfile
from pathlib import Path


def tools_on_path():
    """Put this Python's own folder of commands on PATH: nbgrader calls `alembic` by name, in an environment that need not be activated."""
    folder = str(Path(sys.executable).parent)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = folder + os.pathsep + os.environ.get("PATH", "")


def write(path, content):
    """Replace the file `path` by `content` (text or bytes), making its folder where needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are private; a lesson or a report is not
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
