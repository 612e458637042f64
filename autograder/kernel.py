"""The student's side of a class run: an ordinary IPython kernel in which this lesson's references cannot be imported.

`python -m autograder.kernel -f CONNECTION_FILE` is what the grading process starts. AUTOGRADER_BLOCKED names the
modules, separated by commas; the import system refuses them before any student code runs.
"""
import os
import sys


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


def main():
    blocked = [n for n in os.environ.get("AUTOGRADER_BLOCKED", "").split(",") if n]
    already = [n for n in blocked if n in sys.modules]
    if already:
        raise RuntimeError(f"{', '.join(already)} must not be loaded before the student's code")
    sys.meta_path.insert(0, Refuse(blocked))
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


if __name__ == "__main__":
    main()
