"""Checks that understand mistakes: `from autograder import check, hint, progress, show`.

A student's object is run by a *probe* (autograder/probes, on the student's side) on given arrays; what comes out
is arrays again, and a *judge* (autograder/judge.py, autograder/exercises) decides on them, in the same process in a
notebook, in another one when a class is graded.
"""
from autograder.check import check, hint, progress
from autograder.show import show

__all__ = ["check", "hint", "progress", "show"]
