"""Wrong programs from right ones: each compiles, differs, says what it is, and does what it says."""
import ast
import random

import pytest

from autograder import mutate
from autograder.exercise import KINDS, PLACES

LAYER = '''
class Layer:
    """Docstrings stay."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        a, b = self.net(x).chunk(2, dim=-1)
        return x * a.exp() - b, a.sum(dim=-1)

    def inverse(self, z):
        a, b = self.net(z).chunk(2, dim=-1)
        return (z + b) * (-a).exp()
        raise NotImplementedError("exercise layer: inverse")
'''


@pytest.fixture(scope="module")
def found():
    return mutate.mutants(LAYER, 10, random.Random(0))


def test_each_mutant_is_another_program(found):
    codes = [m.code for m in found]
    assert len(set(codes)) == len(codes) > 40 and ast.unparse(ast.parse(LAYER)) not in codes
    for code in codes:
        compile(code, "mutant", "exec")
        assert "Docstrings stay." in code and "super().__init__()" in code


def test_each_mutant_carries_kinds_and_places_of_the_vocabulary(found):
    for m in found:
        for e in m.edits:
            assert e.kinds and set(e.kinds) <= KINDS and e.places and e.places <= PLACES


@pytest.mark.parametrize("line, kind, place", [
    ("return (x * a.exp() + b, a.sum(dim=-1))", "sign", "forward"),
    ("return (x * a.exp(), a.sum(dim=-1))", "missing term", "forward"),
    ("return (x * a - b, a.sum(dim=-1))", "missing function", "forward"),
    ("return (x / a.exp() - b, a.sum(dim=-1))", "sign", "forward"),
    ("return (x * a.exp() - b, a.mean(dim=-1))", "reduction", "ldj"),
    ("return (x * a.exp() - b, a)", "shape", "ldj"),
    ("return (x * a.exp() - b, a.sum(dim=-1, keepdim=True))", "shape", "ldj"),
    ("return (a.sum(dim=-1), x * a.exp() - b)", "exchanged", "forward"),
    ("return (z + b) * a.exp()", "sign", "inverse"),
    ("return self.forward(z)[0]", "direction", "inverse"),
    ("return z", "missing function", "inverse"),
])
def test_the_slips_that_students_make_are_among_them(found, line, kind, place):
    (mutant,) = [m for m in found if len(m.edits) == 1 and f"        {line}\n" in m.code + "\n"]
    assert kind in mutant.edits[0].kinds and place in mutant.edits[0].places


def test_pairs_have_two_faults_in_different_places(found):
    pairs = [m for m in found if len(m.edits) == 2]
    assert len(pairs) == 10 and all(a.node != b.node for a, b in (m.edits for m in pairs))
    again = mutate.mutants(LAYER, 10, random.Random(0))
    assert [m.code for m in again] == [m.code for m in found]


def test_a_term_that_feeds_the_log_determinant_alone_lies_there():
    code = "class A:\n    def forward(self, x):\n        s = x.exp() + 1.0\n        t = s * 2.0\n        return x - 3.0, t\n"
    places = {e.what: e.places for m in mutate.mutants(code) for e in m.edits}
    assert {frozenset({"ldj"})} == {p for what, p in places.items() if "exp" in what or "2.0" in what}
    assert all("forward" in p for what, p in places.items() if "3.0" in what)
