"""Settings for stock nbgrader on this course's releases: `nbgrader autograde 02_coupling` beside this file just works.

The builder writes its releases with the same settings, so what formgrader generates is what `make lessons` wrote.
"""
import os

c = get_config()  # noqa: F821  (traitlets puts it there)

# A stub is a comment: the NotImplementedError that follows it in every solution cell names the exercise.
c.ClearSolutions.code_stub = {"python": "# your code here"}
c.ClearSolutions.text_stub = "Your answer here."

# A check that trains takes seconds; an endless loop is interrupted after this many.
c.Execute.timeout = 120
c.Execute.startup_timeout = 120
c.Execute.shutdown_kernel = "immediate"


def short_trainings(**_):
    """Kernels started from here on shorten every training, as in all grading."""
    os.environ["FLOWKIT_FAST"] = "1"


def long_trainings(**_):
    """For formgrader, where the grading process lives on and starts other kernels too."""
    os.environ.pop("FLOWKIT_FAST", None)


if "FLOWKIT_FAST" not in os.environ:
    c.Autograde.pre_convert_hook = short_trainings
    c.Autograde.post_convert_hook = long_trainings
