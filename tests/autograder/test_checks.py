"""What a check says of right, wrong and nonsensical answers to every exercise."""
import gc
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from autograder import exercise, fuzz, judge, laws, render, rights
from autograder.check import captured
from autograder.probes.record import Record
from autograder.rights.lesson02 import EvenOdd, OtherHalf

IDS = list(exercise.registry())
RIGHT = rights.table()


def verdict(name, objects, seed=0):
    e = exercise.get(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge.judge(e, seed, e.probe(objects, judge.bank(e, seed).inputs))


def reasons(v):
    return [(c.name, c.sentence, c.example) for c in v.cases if c.sentence]


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("seed", [0, 7, 2026])
def test_reference_gets_full_points(name, seed):
    v = verdict(name, exercise.get(name).reference(), seed)
    assert v.status == "ok" and v.score == v.points, reasons(v)


@pytest.mark.parametrize("name, objects", [pytest.param(n, o, id=f"{n}-{i}") for n in IDS for i, o in enumerate(RIGHT[n])])
def test_a_right_answer_passes_however_it_is_written(name, objects):
    for seed in (0, 5):
        v = verdict(name, objects, seed)
        assert v.status == "ok" and v.score == v.points, reasons(v)


MISTAKES = [pytest.param(n, m, seed, id=f"{n}-{m.id}-{seed}", marks=[pytest.mark.slow] if seed else [])
            for n in IDS for i, m in enumerate(exercise.get(n).misconceptions)
            for seed in (0, 3) if seed == 0 or i % 3 == 0]  # on other inputs every third: these are 3,000 runs


@pytest.mark.parametrize("name, mistake, seed", MISTAKES)
def test_every_misconception_loses_points_and_is_named(name, mistake, seed):
    v = verdict(name, mistake.make(), seed)
    assert v.score < v.points
    assert v.diagnosis == (mistake.id,) and v.sentences == (mistake.sentence,), (v.diagnosis, v.sentences)


@pytest.mark.parametrize("layer", [OtherHalf, EvenOdd])
def test_another_partition_loses_only_the_case_that_asks_for_the_first_half(layer):
    v = verdict("coupling", (layer,))
    assert [c.name for c in v.cases if c.earned < c.points] == ["the first half is passed on"]


class Uncut(RIGHT["coupling"][0][0]):
    def inverse(self, z):
        z1, z2 = z.chunk(1, 1)
        return z1 + z2


class Unfit(RIGHT["coupling"][0][0]):
    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        return torch.cat([x1, x2 + self.net(x)], 0), x.sum(1)


@pytest.mark.parametrize("layer, name, place, words", [(Uncut, "raised_unpacking", "inverse", "another number of pieces"),
                                                       (Unfit, "raised_shapes", "forward", "shapes do not fit together")])
def test_an_exception_is_explained(layer, name, place, words):
    v = verdict("coupling", (layer,))
    assert v.diagnosis == (name,) and v.faults[0][1] == place
    assert "raised" in v.sentences[0] and words in v.sentences[1]


def test_an_ldj_of_shape_b_1_fails_and_says_so():
    (mistake,) = [m for m in exercise.get("coupling").misconceptions if m.id == "ldj_no_sum"]
    v = verdict("coupling", mistake.make())
    assert v.score < v.points and "(B, 1)" in v.sentences[0] and "(8, 1)" in v.cases[0].sentence


class Identity:
    def __init__(self, *args):
        pass

    def forward(self, x):
        return x, torch.zeros(len(x))

    def inverse(self, z):
        return z


@pytest.mark.parametrize("name", ["coupling", "permute", "additive_coupling", "act_norm", "invertible_linear", "mix_coupling", "compose", "planar", "radial", "sylvester"])
def test_returning_the_input_is_not_an_answer(name):
    """Laws alone hold for a layer that does nothing; it may keep the point for shapes, and no more."""
    v = verdict(name, (Identity,))
    assert v.score <= 1 and v.status == "wrong", (v.score, reasons(v))


def test_two_mistakes_in_one_program_are_both_named():
    from autograder.exercises.lesson02 import PlainCoupling

    both = type("Two", (PlainCoupling,), {"unbend": lambda self, z2, a, m: (z2 - m) * a.exp(), "ldj": lambda self, a: a.sum()})
    v = verdict("coupling", (both,))
    assert set(v.diagnosis) == {"inverse_alpha_sign", "ldj_batch_sum"}, v.diagnosis


def test_a_fault_in_an_unusual_parametrisation_is_named():
    """alpha softly bounded: no misconception has these numbers, but the Jacobian of the student's own forward tells."""
    from autograder.exercises.lesson02 import PlainCoupling

    class Bounded(PlainCoupling):
        def params(self, x1):
            alpha, mu = self.net(x1).chunk(2, -1)
            return 2 * torch.tanh(alpha / 2), mu

    for override, expected in (({"ldj": lambda s, a: -a.sum(-1)}, ("ldj_sign",)), ({"ldj": lambda s, a: a}, ("ldj_no_sum",)),
                               ({"ldj": lambda s, a: a.mean(-1)}, ("ldj_mean",)), ({"ldj": lambda s, a: -a.sum()}, ("ldj_sign", "ldj_batch_sum"))):
        v = verdict("coupling", (type("Faulty", (Bounded,), override),))
        assert v.diagnosis == expected and v.score < v.points


def test_mistakes_are_named_with_mu_before_alpha_too():
    from autograder.exercises.lesson02 import PlainCoupling

    class MuFirst(PlainCoupling):
        def params(self, x1):
            mu, alpha = self.net(x1).chunk(2, -1)
            return alpha, mu

        def unbend(self, z2, alpha, mu):
            return (z2 - mu) * alpha.exp()

    assert verdict("coupling", (MuFirst,)).diagnosis == ("inverse_alpha_sign",)


# --- nonsense --------------------------------------------------------------------------------------------------------

class Hostile:
    __class__ = torch.Tensor

    def __eq__(self, other):
        raise RuntimeError("eq")

    def __array__(self, *a, **k):
        raise RuntimeError("array")

    def __len__(self):
        return -1

    def __getattr__(self, name):
        raise RuntimeError("attribute")

    def __repr__(self):
        raise RuntimeError("repr")

    __str__ = __repr__


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("str")


def generator():
    yield 1


def raising(error):
    def f():
        raise error
    return f


NONSENSE = {
    "None": lambda: None, "a tuple of three": lambda: (torch.zeros(8, 2), torch.zeros(8), 3), "one tensor": lambda: torch.zeros(8, 2),
    "numpy": lambda: (np.zeros((8, 2)), np.zeros(8)), "integers": lambda: (1, 2), "an int": lambda: 3, "a string": lambda: "z",
    "a generator": generator, "NaN": lambda: (torch.full((8, 2), math.nan), torch.zeros(8)), "infinity": lambda: (torch.zeros(8, 2), torch.full((8,), math.inf)),
    "ragged": lambda: (torch.zeros(3), [torch.zeros(2)]), "another device": lambda: (torch.zeros(8, 2, device="meta"), torch.zeros(8, device="meta")),
    "hostile": Hostile, "a pair of hostiles": lambda: (Hostile(), Hostile()), "complex": lambda: (torch.zeros(8, 2, dtype=torch.complex64), torch.zeros(8)),
    "sparse": lambda: (torch.zeros(8, 2).to_sparse(), torch.zeros(8)), "empty": lambda: (torch.zeros(0), torch.zeros(0)), "scalars": lambda: (torch.zeros(()), torch.zeros(())),
    "huge": lambda: (torch.zeros(1).expand(10**7), torch.zeros(8)), "integers in tensors": lambda: (torch.ones(8, 2, dtype=torch.long), torch.ones(8, dtype=torch.long)),
    "booleans": lambda: (torch.ones(8, 2, dtype=torch.bool), torch.ones(8, dtype=torch.bool)), "half": lambda: (torch.ones(8, 2, dtype=torch.float16), torch.ones(8, dtype=torch.bfloat16)),
    "exit": raising(SystemExit(3)), "an exception": raising(ValueError("of mine")), "an unprintable exception": raising(Unprintable()),
    "a recursion": raising(RecursionError("deep")), "a generator exit": raising(GeneratorExit()), "a base exception": raising(BaseException("base")),
}


def handed(name, thing):
    """The thing, as often as the exercise takes an object."""
    return (thing,) * len(exercise.get(name).reference())


def answer(name, make):
    """An answer to the exercise that returns nonsense wherever it returns something: what is handed to its check."""
    if not isinstance(exercise.get(name).reference()[0], type):
        return handed(name, lambda *a, **k: make())
    methods = dict.fromkeys(("forward", "inverse", "log_prob", "sample"), lambda self, x: make()) | {"__init__": lambda self, *a: None}
    return handed(name, type("Nonsense", (), methods))


@pytest.mark.parametrize("name", IDS)
def test_nonsense_gets_one_clear_sentence(name):
    for what, make in NONSENSE.items():
        if name == "bonus_study" and what == "an int":
            continue  # an int is a number, and the case that asks for an effect of the setting fails it
        v = verdict(name, answer(name, make))
        assert v.score < v.points and v.status in ("wrong", "error"), (what, v)
        assert v.sentences and all(s.strip() and "\n" not in s and "Traceback" not in s for s in v.sentences), (what, v.sentences)
        assert render.text(v) and render.page(v)


@pytest.mark.parametrize("name", IDS)
def test_what_a_student_wrote_is_never_html(name):
    """An exception's text and printed text reach the page as text."""
    script = "<script>alert(1)</script> `<img src=x onerror=alert(2)>`"
    v = verdict(name, answer(name, raising(ValueError(script))))
    page = render.page(v, printed=script)
    assert any("script" in sentence for sentence in v.sentences) and "&lt;script&gt;" in page
    assert "<script" not in page and "<img" not in page


@pytest.mark.parametrize("name", IDS)
def test_what_is_no_answer_at_all(name):
    for thing in (None, 3, "text", Hostile, type("Empty", (), {}), lambda: None, torch.zeros(3), Unprintable):
        v = verdict(name, handed(name, thing))
        assert v.score == 0 and v.sentences, (thing, v)


@pytest.mark.parametrize("name", IDS)
def test_the_stub_is_unsolved(name):
    v = verdict(name, answer(name, raising(NotImplementedError(f"exercise {name}"))))
    assert v.status == "unsolved" and v.score == 0 and not v.sentences
    assert "not solved yet" in render.text(v)


@pytest.mark.parametrize("name", IDS)
def test_a_keyboard_interrupt_is_the_persons_own(name):
    with pytest.raises(KeyboardInterrupt):
        verdict(name, answer(name, raising(KeyboardInterrupt())))


@pytest.mark.parametrize("name", IDS)
def test_pictures_are_drawn_for_any_answer(name):
    e = exercise.get(name)
    answers = judge.bank(e, 0)
    for objects in (e.reference(), e.misconceptions[0].make(), answer(name, lambda: None), answer(name, raising(NotImplementedError()))):
        arrays = e.probe(objects, answers.inputs)
        png = render.picture(e, answers, arrays)
        assert png is None or png.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", IDS)
def test_inputs_are_not_changed_and_outputs_repeat(name):
    """A probe leaves the judge's inputs as they were, and gives the same arrays twice."""
    e = exercise.get(name)
    inputs = e.draw(1)
    before = {k: v.copy() for k, v in inputs.items()}
    first, second = (e.probe(e.reference(), inputs) for _ in range(2))
    assert all(np.array_equal(inputs[k], before[k]) for k in before)
    assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k], equal_nan=first[k].dtype.kind == "f") for k in first)


@pytest.mark.parametrize("name", IDS)
def test_records_are_complete(name):
    e = exercise.get(name)
    assert e.points > 0 and e.minutes > 0 and e.title and all(len(h) > 40 for h in e.hints)
    assert len(e.misconceptions) >= 3 and e.picture is not None
    for m in e.misconceptions:
        assert m.sentence.endswith(".") and len(m.sentence) < 220


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((4, 2)), np.zeros(3)])
def test_a_shape_that_changes_from_call_to_call_is_a_sentence(values):
    """Found by random answers: a derivative by differences needs the same shape each time."""
    with pytest.raises(exercise.Fail, match="another shape"):
        laws.directional(values)


def test_two_objects_where_one_is_asked_for_are_told_in_one_sentence():
    v = verdict("permute", (Identity, Identity))
    assert v.score == 0 and v.sentences == ("This exercise takes 1 object after its id; 2 were handed in.",)


class Sly(type):
    """A metaclass that does not want its classes to be named."""

    @property
    def __name__(cls):
        raise KeyError("no name")


class Touchy(Exception, metaclass=Sly):
    """An exception that raises when it is looked at."""

    def __getattr__(self, name):
        raise RuntimeError("hands off")


STRANGE = {
    "touchy": (lambda: Touchy(), "raised Touchy"),
    "half a character": (lambda: ValueError("\ud800 broken"), "raised ValueError: ? broken"),
    "long": (lambda: ValueError("x" * 5000), "raised ValueError: xxx"),
    "two lines": (lambda: ValueError("two\nlines"), "ValueError: two lines"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_exceptions_become_one_sentence(name):
    make, words = STRANGE[name]

    class Raising:
        def __init__(self, order):
            raise make()

    v = verdict("permute", (Raising,))
    assert v.score == 0 and words in v.sentences[0] and len(v.sentences[0]) <= 600 and "\n" not in v.sentences[0]
    v.sentences[0].encode("utf-8")


def test_a_number_too_long_to_print_is_described():
    v = verdict("bonus_study", (lambda setting: [10 ** 5000],))
    assert v.score < v.points and len(v.sentences[0]) <= 600
    v = verdict("make_net", (lambda: 10 ** 5000,))
    assert v.score == 0 and "very large int" in " ".join(v.sentences)


# --- what the random answers of autograder.fuzz found, a family of causes each ---------------------------------------

def spoilt(name, spot, act):
    """The right class of an exercise, of which the method `spot` returns what act(right value, arguments) makes of it."""
    (right,) = exercise.get(name).reference()
    method = getattr(right, spot)
    return type("Spoilt", (right,), {spot: lambda self, *args: act(method(self, *args), args)})


UNREADABLE = {
    "nested": "dense real tensor; it is nested", "escaped from vmap": "cannot be read", "without storage": "cannot be read",
    "without memory": "no memory that holds its numbers", "sparse": "dense real tensor", "meta": "lives on the device meta",
}


@pytest.mark.parametrize("form", UNREADABLE)
@pytest.mark.parametrize("spot", ["forward", "inverse"])
def test_a_tensor_without_numbers_becomes_one_sentence(form, spot):
    def act(right, args):
        bad = fuzz.tensor("float32", form, "like", None, args[0])
        return (bad, right[1]) if spot == "forward" else bad

    v = verdict("permute", (spoilt("permute", spot, act),))
    assert v.score < v.points and any(UNREADABLE[form] in c.sentence for c in v.cases), reasons(v)
    assert all(len(c.sentence.splitlines()) < 2 for c in v.cases)


@pytest.mark.parametrize("form", fuzz.HOLLOW)
def test_a_state_without_memory_is_not_loaded(form):
    """torch would copy from an address that is not there, and the process would end."""
    (right,) = exercise.get("act_norm").reference()

    class Hollow(right):
        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            for value in state.values():
                value.data = fuzz.tensor("float64", form, tuple(value.shape), 1.0, None)
            return state

    v = verdict("act_norm", (Hollow,))
    assert v.score < v.points and any("no memory that holds" in c.sentence or "cannot be read" in c.sentence for c in v.cases), reasons(v)


@pytest.mark.parametrize("kind", [fuzz.Odd, fuzz.Raising, nn.Parameter])
def test_a_right_answer_in_a_class_of_tensors_of_its_own_is_right(kind):
    """The class may raise whenever it is asked for something; the numbers are read without asking it."""
    v = verdict("permute", (spoilt("permute", "forward", lambda right, args: tuple(t.as_subclass(kind) for t in right)),))
    assert v.score == v.points, reasons(v)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.uint8, torch.uint16])
@pytest.mark.parametrize("name", ["permute", "act_norm", "invertible_linear"])
def test_numbers_of_a_strange_kind_are_judged(name, dtype):
    v = verdict(name, (spoilt(name, "forward", lambda right, args: tuple(t.detach().to(dtype) for t in right)),))
    for case in v.cases:
        if case.earned < case.points:
            fuzz.clear(case.sentence)
            assert "cannot be read" not in case.sentence


@pytest.mark.parametrize("spot, words", [("forward", "its input `x`"), ("inverse", "its input `z`")])
@pytest.mark.parametrize("data", [lambda t: t.data.bfloat16(), lambda t: torch.zeros(0), lambda t: t.data.to(torch.bool)])
def test_an_input_whose_data_are_exchanged_was_changed(spot, words, data):
    def act(right, args):
        args[0].data = data(args[0])
        return right

    v = verdict("coupling", (spoilt("coupling", spot, act),))
    assert v.score < v.points and any(words in c.sentence for c in v.cases), reasons(v)


@pytest.mark.parametrize("name", ["permute", "mix_logit_cdf"])
@pytest.mark.parametrize("change", fuzz.WORLD)
def test_what_an_answer_sets_for_the_process_is_set_back(name, change):
    def act(right, args):
        fuzz.WORLD[change]()
        return right

    e = exercise.get(name)
    answer = spoilt(name, "forward", act) if name == "permute" else lambda *args: act(e.reference()[0](*args), args)
    fuzz.by_parts(e, fuzz.Handed(change, lambda: (answer,)), 0)     # raises Leak where something stays changed


def test_a_default_device_of_the_students_own_costs_nothing():
    """The notebook may have set a device for its trainings; the check's tensors are on the CPU."""
    torch.set_default_device("meta")
    try:
        for name in ("permute", "act_norm", "make_net", "train_flow"):
            v = verdict(name, exercise.get(name).reference())
            assert v.score == v.points, reasons(v)
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


def test_streams_are_set_back_after_each_call():
    before = sys.stdout, sys.stderr
    for bad in (None, 7):
        Record().run("forward", lambda bad=bad: (setattr(sys, "stdout", bad), setattr(sys, "stderr", bad)))
        assert (sys.stdout, sys.stderr) == before


def raise_boom(self):
    raise RuntimeError("boom")


def boom_later(self):
    """Gives its parameters once, and raises ever after."""
    self.__dict__["asked"] = self.__dict__.get("asked", 0) + 1
    return list(nn.Module.parameters(self)) if self.asked == 1 else raise_boom(self)


@pytest.mark.parametrize("name", ["act_norm", "invertible_linear", "make_net"])
@pytest.mark.parametrize("found, words", [
    (lambda self: 3, "parameters raised TypeError"), (lambda self: [1], "a parameter should be a torch.Tensor; it is the int 1"),
    (raise_boom, "raised RuntimeError: boom"), (boom_later, ""),
    (lambda self: [fuzz.tensor("float32", "sparse", (2,), 1.0, None)], "a parameter should be a dense real tensor"),
    (lambda self: [nn.UninitializedParameter()], "raised ValueError"), (lambda self: [torch.ones(2, dtype=torch.int64)], "")])
def test_parameters_that_are_none_become_one_sentence(name, found, words):
    if name == "make_net":
        right = type(exercise.get(name).reference()[0]())

        def answer():
            net = exercise.get(name).reference()[0]()
            net.__class__ = type("Net", (right,), {"parameters": found})
            return net
    else:
        answer = type("Spoilt", exercise.get(name).reference(), {"parameters": found})
    v = verdict(name, (answer,))
    assert v.score < v.points or found is boom_later
    for case in v.cases:
        if case.earned < case.points:
            fuzz.clear(case.sentence)
    assert any(words in c.sentence for c in v.cases), reasons(v)


@pytest.mark.parametrize("name", ["act_norm", "invertible_linear"])
def test_a_batch_that_comes_back_in_another_shape_is_told(name):
    """Though the points around it come back as they should."""
    rows = len(judge.bank(exercise.get(name), 0).inputs["x"])
    v = verdict(name, (spoilt(name, "forward", lambda right, args: (right[0][:3], right[1]) if len(args[0]) == rows else right),))
    assert v.score < v.points and any("it should be (B, D)" in c.sentence for c in v.cases), reasons(v)


class Empty(nn.Linear):
    def forward(self, x):
        return super().forward(x)[:0]


class Growing(nn.Linear):
    """Returns another number of columns at each call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x).repeat(1, self.calls)


class Squeezing(nn.Linear):
    """For one row it returns no row at all."""

    def forward(self, x):
        return 2 * super().forward(x.tanh()).tanh().squeeze(0)


@pytest.mark.parametrize("net", [Empty, Growing, Squeezing])
def test_a_net_of_changing_shapes_is_told(net):
    v = verdict("make_net", (lambda: net(1, 2),))
    assert v.score < v.points and "shape" in " ".join(v.sentences), v.sentences


def test_a_net_of_lazy_layers_is_right():
    v = verdict("make_net", (lambda: nn.Sequential(nn.LazyLinear(32), nn.Tanh(), nn.LazyLinear(2)),))
    assert v.score == v.points, reasons(v)


@pytest.mark.parametrize("spoil", [{"a": None}, {"diary": 3}, {"log_prob": 7}, {"a": nn.Parameter(torch.zeros(0))}])
def test_a_flow_that_is_spoilt_after_its_training_does_not_spoil_the_check(spoil):
    """What is read afterwards are the parameters and the diary that were handed over."""
    def train(flow, batches, lr):
        losses = exercise.get("train_flow").reference()[0](flow, batches, lr)
        for k, v in spoil.items():
            setattr(flow, k, v)
        return losses

    v = verdict("train_flow", (train,))
    assert v.score == v.points, reasons(v)


def test_a_loss_that_left_vmap_becomes_one_sentence():
    def train(flow, batches, lr):
        losses = exercise.get("train_flow").reference()[0](flow, batches, lr)
        return [fuzz.tensor("float32", "escaped from vmap", (2,), 1.0, None) for _ in losses]

    v = verdict("train_flow", (train,))
    assert v.score < v.points and any("cannot be read" in c.sentence for c in v.cases), reasons(v)


def test_garbage_that_complains_does_so_inside_the_check(capfd, monkeypatch):
    """nbgrader gives 0 to a cell that wrote to stderr; a cycle with a raising __del__ would do so whenever it is collected."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with captured() as printed:
        fuzz.WORLD["leaves garbage that bites"]()
    gc.collect()
    assert "boom" in printed[0] and capfd.readouterr().err == ""
