"""Lesson 00, the page for the hall: live views only, nothing to solve."""

ASSIGNMENT = "00_lecture"
TITLE = "The lectures, live"
REFERENCES = ()
TEXTS = {}
EXERCISES = ()
