"""Stands in for grade.grade_one where a test is about what happens around it: quick, and the same every time."""
import nbformat

from autograder import grade


def unsolved(order):
    """Every exercise unsolved, an empty notebook, a page that says nothing."""
    blank = [order.release.blank(t, "unsolved") for t in order.release.tasks]
    result = grade.Result(order.student, order.assignment, order.key, order.timeout, blank)
    return grade.Graded(result, nbformat.writes(nbformat.v4.new_notebook()), "<p>nothing</p>")
