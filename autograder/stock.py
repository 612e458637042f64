"""Stock nbgrader at the speed and with the isolation of a class run: what nbgrader_config.py puts in the place of nbgrader's own steps.

`nbgrader autograde` and formgrader's button go through two preprocessors here. `Rebuild` puts the answers of what was handed in into the release,
as autograder.intake does, before nbgrader looks at it; `Judged` stands where nbgrader's Execute stood: the cells run in a confined child of a warm
parent, the judge decides in this process, and the scores are written where nbgrader's own SaveAutoGrades reads them. No kernel is
started, so there is none to provision. All else is nbgrader's: gradebook, penalties for lateness, feedback, formgrader.

As in a class run, cells tagged `show` are not run. An assignment that is none of this course's lessons is handled as nbgrader always did, and so
is everything where this machine cannot confine a student's code, which is said. The warm parent lives as long as the process: one
`nbgrader autograde`, or the server that formgrader runs in.
"""
import os
from functools import cache
from pathlib import Path

from nbgrader.preprocessors import Execute, NbGraderPreprocessor


class Rebuild(NbGraderPreprocessor):
    """The release with this submission's answers and extra cells; what was otherwise amiss in it goes to the log."""

    def preprocess(self, nb, resources):
        release = released(self, resources)
        if release is None:
            return nb, resources
        from autograder import intake

        rebuilt = intake.rebuild(release.notebook, nb)
        for note in rebuilt.notes:
            self.log.warning("%s: %s", resources["nbgrader"]["student"], note)
        return rebuilt.notebook, resources


class Judged(Execute):
    """Runs a submission in a confined child and writes the judge's scores; `timeout` is in seconds for one cell."""

    def preprocess(self, nb, resources, km=None):
        release, lacks = released(self, resources), unconfined()
        if release is None or lacks:
            if lacks:
                self.log.warning("Students' code cannot be confined here (%s). It is executed as stock nbgrader does, unprotected.", lacks)
            return super().preprocess(nb, resources, km)
        import torch

        from autograder import grade, intake, workers

        torch.set_num_threads(1)    # small nets are fastest so, and sums come out as in a class run
        rebuilt, seed, notes = intake.rebuild(release.notebook, nb), seed_of(coursedir(self)), []
        exercises = [t for t in release.tasks if not isinstance(t, str)]
        run, verdicts = grade.judged(release, rebuilt, exercises, seed, self.timeout, workers.parent(()))
        pages = {v.exercise: grade.page(release, v, run.arrays.get(v.exercise), seed, notes) for v in verdicts}
        grade.record_scores(rebuilt.notebook, verdicts, pages)
        for note in grade.trouble(rebuilt, run) + notes:
            self.log.warning("%s: %s", resources["nbgrader"]["student"], note)
        return rebuilt.notebook, resources


def coursedir(preprocessor):
    """nbgrader's CourseDirectory: a preprocessor belongs to an exporter, and that to the converter."""
    return preprocessor.parent.parent.coursedir


def released(preprocessor, resources):
    """The Release that a submission answers, from release/ of its course, or from source/ of a folder that a class run left; None where
    it answers none of this course's lessons. A source with solutions is never taken: a cell that is missing would be solved.
    """
    directory, what = coursedir(preprocessor), resources["nbgrader"]
    for pattern in (directory.release_directory, directory.source_directory):
        path = Path(directory.format_path(pattern, ".", what["assignment"])) / f"{what['notebook']}.ipynb"
        if path.is_file():
            return _release(path, path.stat().st_mtime_ns)
    return None


@cache
def _release(path, _):
    import nbformat

    from autograder import exercise, grade, intake

    data = path.read_bytes()
    if path.stem not in {m.ASSIGNMENT for m in exercise.lessons().values() if m.EXERCISES} or b"### BEGIN SOLUTION" in data:
        return None
    return grade.Release(path.stem, nbformat.reads(data.decode(), as_version=4), intake.digest(data))


@cache
def unconfined():
    """What this machine lacks to confine a student's code, in words; empty where nothing is lacking."""
    from autograder import sandbox

    return "; ".join(f"{layer}: {reason}" for layer, reason in sandbox.missing().items())


def seed_of(directory):
    """AUTOGRADER_SEED, else the seed of the class run that was made in the course's folder, else one that is drawn once for this folder."""
    from autograder import grade

    given = os.environ.get("AUTOGRADER_SEED")
    return grade.chosen_seed(Path(directory.root), None if given is None else int(given))
