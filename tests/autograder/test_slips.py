"""Faults that nobody wrote down as a misconception: slips of the pen are recognised by what other right answers give with the same slip."""
import ast

import pytest
import torch
from torch import nn

from autograder import exercise, judge, mutate, slips


def verdict(name, objects):
    e = exercise.get(name)
    return judge.judge(e, 0, e.probe(objects, judge.bank(e, 0).inputs))


class Own(nn.Module):
    """A coupling layer in nobody's words but its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def numbers(self, u):
        out, half = self.net(u), u.shape[-1]
        return out[..., :half], out[..., half:]

    def forward(self, x):
        half = x.shape[-1] // 2
        u, v = x[..., :half], x[..., half:]
        a, m = self.numbers(u)
        return torch.cat((u, self.there(v, a, m)), dim=-1), a.sum(dim=-1)

    def there(self, v, a, m):
        return v * a.exp() + m

    def back(self, w, a, m):
        return (w - m) / a.exp()

    def inverse(self, z):
        half = z.shape[-1] // 2
        u, w = z[..., :half], z[..., half:]
        a, m = self.numbers(u)
        return torch.cat((u, self.back(w, a, m)), dim=-1)


FAULTS = {
    "a sum for a product in inverse": ({"back": lambda self, w, a, m: (w - m) + (-a).exp()}, "wrong function", "inverse"),
    "a log for an exp in forward": ({"there": lambda self, v, a, m: v * a.log() + m}, "wrong function", "forward"),
    "a difference turned round in inverse": ({"back": lambda self, w, a, m: (m - w) / a.exp()}, "sign", "inverse"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_slip_is_told_by_its_kind_and_place(name):
    methods, kind, place = FAULTS[name]
    v = verdict("coupling", (type("Slipped", (Own,), methods),))
    assert v.faults == ((kind, place),) and v.diagnosis == (f"slip_{place}_{kind.replace(' ', '_')}",)
    assert len(v.sentences) == 2 and slips.PLACE[place] in v.sentences[1] and slips.KIND[kind] in v.sentences[1]


def test_two_slips_in_one_program_are_both_told():
    v = verdict("coupling", (type("Slipped", (Own,), {"there": FAULTS["a log for an exp in forward"][0]["there"],
                                                      "back": lambda self, w, a, m: (m - w) / a.exp()}),))
    assert len(v.faults) == 2 and {p for _, p in v.faults} == {"forward", "inverse"}


def test_a_fault_that_is_nobodys_slip_gets_no_name():
    v = verdict("coupling", (type("Odd", (Own,), {"back": lambda self, w, a, m: (w - m) / a.exp() + w.sin()}),))
    assert v.diagnosis == () and "does not give" in v.sentences[0]


def test_a_misconception_is_preferred_to_a_slip():
    v = verdict("coupling", (type("Known", (Own,), {"back": lambda self, w, a, m: w / a.exp()}),))
    assert v.diagnosis == ("inverse_no_mu",)


def test_the_budget_ends_what_does_not_end():
    with pytest.raises(RuntimeError, match="too many operations"), slips.Budget(50):
        x = torch.zeros(1)
        while (x < 1).all():
            x = x * 1


def test_an_answer_that_is_ended_leaves_the_world_as_it_was():
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state()
    e = exercise.get("coupling")
    for most in (0, 5, 40, 200, 600):
        with pytest.raises(slips.Endless), slips.Budget(most):
            e.probe((Own,), judge.bank(e, 0).inputs)
            torch.zeros(1) + 1
        assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before[:2] and torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", exercise.registry())
def test_slips_are_bounded_and_come_from_right_answers(name):
    answers = judge.bank(exercise.get(name), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", open("/dev/null", "w"))     # some right answers print
        found = answers.sources()
    assert sum(len(slips.slips(s)) * most for s, most in found) <= slips.OPERATIONS * slips.PATIENCE
    for source, _ in found:
        e = exercise.get(name)
        assert judge.judge(e, 0, e.probe(source.make(), answers.inputs)).status == "ok"


def test_an_answer_of_two_functions_has_the_slips_of_both():
    source = slips.sources("modular_shift")[0]
    assert len(source.names) == len(source.make()) == 2
    assert {e.method for s in slips.slips(source) for e in s.edits} == set(source.names)


def test_every_kind_and_place_of_a_mutant_has_its_words():
    for name in exercise.registry():
        for source in slips.sources(name):
            for slip in slips.slips(source):
                for edit in slip.edits:
                    assert edit.kinds[0] in slips.KIND and edit.place in slips.PLACE, (name, slip.id)


def test_slips_that_cannot_be_told_apart_are_told_as_either():
    code = "def f(x, y):\n    a = x + y\n    return a.exp(), a"
    by_words = {e.what.split(",")[0].removeprefix("f: "): slips.Slip(None, m.code, m.edits) for m in mutate.mutants(code) for e in m.edits}
    sign, dropped = by_words["a sign turned"], by_words["exp dropped"]
    assert [f[1] for f in slips.told([sign])] == ["sign"]
    either = slips.told([sign, dropped])
    assert [f[1] for f in either] == ["sign", "missing function"] and either[1][3].startswith("Or else: ")
    assert slips.told([sign, dropped, by_words["two in the wrong order"]]) == []


def test_two_edits_are_applied_together_unless_one_lies_in_the_other():
    code = ast.unparse(ast.parse("def f(x):\n    y = (x - 1).exp()\n    return y * 2"))
    found = {m.name: m.edits[0] for m in mutate.mutants(code)}
    minus = next(e for n, e in found.items() if "x - 1 -> x + 1" in n)
    times = next(e for n, e in found.items() if "y * 2 -> y / 2" in n)
    dropped = next(e for n, e in found.items() if "exp dropped" in n)
    assert mutate.edited(code, minus, times) == "def f(x):\n    y = (x + 1).exp()\n    return y / 2"
    assert mutate.edited(code, minus, dropped) is None
