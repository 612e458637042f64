"""A file is either as it was or complete: written beside its place, flushed to disk, then moved there in one step."""
import os
import tempfile
from pathlib import Path


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
