"""The judge's side: references, cases, misconceptions, hints and pictures, one file a lesson (see autograder.exercise)."""
