"""Settings for stock nbgrader on this course's releases: `nbgrader autograde 02_coupling` and formgrader beside this file just work.

The builder writes its releases with the same settings, so what formgrader generates is what `make lessons` wrote. Submissions
are graded as a class run does it, fast and confined (autograder.stock). Without the two lists of preprocessors nbgrader starts a
kernel for each and lets it do as it likes: slower, for submissions that you trust, with the same scores.
"""
import os
from importlib.util import find_spec

c = get_config()  # noqa: F821  (traitlets puts it there)

# A stub is a comment: the NotImplementedError that follows it in every solution cell names the exercise.
c.ClearSolutions.code_stub = {"python": "# your code here"}
c.ClearSolutions.text_stub = "Your answer here."

# A check that trains takes seconds; an endless loop is interrupted after this many.
c.Execute.timeout = 120
c.Execute.startup_timeout = 120
c.Execute.shutdown_kernel = "immediate"

if find_spec("autograder"):
    # nbgrader's own lists, with Rebuild before the others and Judged in place of Execute.
    ours, theirs = "autograder.stock", "nbgrader.preprocessors"
    c.Autograde.sanitize_preprocessors = [
        f"{ours}.Rebuild", f"{theirs}.ClearOutput", f"{theirs}.DeduplicateIds", f"{theirs}.OverwriteKernelspec", f"{theirs}.OverwriteCells",
        f"{theirs}.CheckCellMetadata"]
    c.Autograde.autograde_preprocessors = [
        f"{ours}.Judged", f"{theirs}.IgnorePattern", "nbconvert.preprocessors.ClearMetadataPreprocessor", f"{theirs}.LimitOutput",
        f"{theirs}.SaveAutoGrades", f"{theirs}.AssignLatePenalties", f"{theirs}.CheckCellMetadata"]


def short_trainings(**_):
    """Kernels started from here on shorten every training, as in all grading."""
    os.environ["FLOWKIT_FAST"] = "1"


def long_trainings(**_):
    """For formgrader, where the grading process lives on and starts other kernels too."""
    os.environ.pop("FLOWKIT_FAST", None)


if "FLOWKIT_FAST" not in os.environ:
    c.Autograde.pre_convert_hook = short_trainings
    c.Autograde.post_convert_hook = long_trainings
