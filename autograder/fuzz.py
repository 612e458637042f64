"""Hostile answers, drawn at random: whatever a student hands in, what leaves the checker is one clear sentence.

A `Behaviour` is what a spot of a student's program (construction, forward, parameters(), ...) does when it is reached: it
returns something strange, raises, or changes the world and goes on. `crashes` builds answers from them and judges each.
Endless loops, os._exit and the like are left out, and so is memory taken from what the answer itself goes on to read (a process
dies of that wherever it runs): those belong to confinement. hypothesis is a development dependency.
"""
import contextlib
import gc
import inspect
import io
import itertools
import math
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autograder import exercise as records
from autograder import judge
from autograder.check import captured, check
from autograder.probes.record import settings_kept

MARK = "printed by a student"
LONGEST = 600  # characters of a sentence
GO_ON = object()  # what a behaviour returns to let the original do its work after all
DTYPES = ("bool", "uint8", "int16", "int32", "int64", "uint16", "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
    "float8_e4m3fn")
HOLLOW = ("without storage", "without memory")
FORMS = (*["plain"] * 8, "requires_grad", "of a graph", "parameter", "sparse", "csr", "mkldnn", "quantised", "meta", "transposed", "expanded",
    "negative view",
         "inference", "escaped from vmap", "hostile subclass", "subclass with hostile attributes", *HOLLOW, "nested")
SHAPES = (*["like"] * 8, (), (0,), (1,), (2,), (6,), (0, 2), (1, 1), (1, 2), (2, 0), (6, 6), (3, 1, 2), (1, 2, 0, 3), (2, 2, 2, 2), (999, 1000),
    (7, 1, 50, 50))
FILLS = {"noise": None, "0": 0.0, "1": 1.0, "-3": -3.0, "NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "1e30": 1e30}


@dataclass(frozen=True)
class Behaviour:
    """`act(like, arguments)`: `like` is what is replaced, or the first argument. Values are made at each call, never shared."""

    name: str
    act: Callable


def tensor(dtype, form, shape, fill, like):
    """A tensor of that kind; one that torch itself refuses to make raises, which is as good an answer as any."""
    size = (tuple(like.shape) if type(like) is torch.Tensor and like.dim() < 5 else (3,)) if shape == "like" else shape
    t = (torch.randn(size) if fill is None else torch.full(size, fill)).to(getattr(torch, dtype))
    makers = {
        "requires_grad": lambda: t.requires_grad_(), "of a graph": lambda: t.requires_grad_() * 1,
            "parameter": lambda: nn.Parameter(t, t.is_floating_point()),
        "sparse": t.to_sparse, "csr": lambda: t.to_sparse_csr(), "mkldnn": lambda: t.float().to_mkldnn(), "meta": lambda: t.to("meta"),
        "quantised": lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8), "transposed": lambda: t.mT,
        "negative view": lambda: torch._neg_view(t),
        "expanded": lambda: t[None].expand(3, *t.shape), "hostile subclass": lambda: t.as_subclass(Raising), "without storage": Bare,
        "without memory": lambda: (t.untyped_storage().resize_(0), t)[1],
        "subclass with hostile attributes": lambda: t.as_subclass(Odd), "nested": lambda: torch.nested.nested_tensor([t, t]),
    }
    if form == "escaped from vmap":
        kept = []
        torch.func.vmap(lambda x: (kept.append(x), x)[1])(t)
        return kept[0]
    with torch.inference_mode(form == "inference"):
        return makers.get(form, t.clone)()


class Raising(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("hostile __torch_function__")


class Bare(torch.Tensor):
    """A tensor of which every operation is answered by Python, and raises."""

    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("hostile __torch_dispatch__")


def boom(*args, **kwargs):
    raise RuntimeError("boom")


Odd = type("Odd", (torch.Tensor,), {n: property(boom) for n in ("layout", "shape", "dtype", "device", "is_quantized",
    "requires_grad")} | {"dim": boom, "numel": boom})
METHODS = ("eq", "array", "len", "iter", "next", "getattr", "getattribute", "bool", "repr", "str", "float", "index", "hash", "call", "del", "format",
    "torch_function")
OBJECTS = {f"an object whose __{m}__ {word}": lambda m=m, f=f: type("Hostile", (), {f"__{m}__": f})()
           for m in METHODS for word, f in (("raises", boom), ("returns nonsense", lambda *a, **k: -7))}
META = type("Meta", (type,), {"__name__": property(boom), "__instancecheck__": boom, "__len__": boom, "__iter__": boom, "__eq__": boom,
    "__hash__": type.__hash__})
OBJECTS |= {
    "an object whose __class__ raises": lambda: type("Hostile", (), {"__class__": property(boom)})(),
    "an object that claims to be a tensor": lambda: type("Hostile", (), {"__class__": property(lambda self: torch.Tensor)})(),
    "an object that claims to be a module": lambda: type("Hostile", (), {"__class__": property(lambda self: nn.Module)})(),
    "an object of a hostile metaclass": lambda: META("Hostile", (), {})(), "a class of a hostile metaclass": lambda: META("Hostile", (), {}),
    "an object of a class with a strange name": lambda: type("two\nlines" + "x" * 700, (), {})(), "a lone surrogate": lambda: "\ud800",
    "None": lambda: None, "Ellipsis": lambda: ..., "NotImplemented": lambda: NotImplemented, "a complex number": lambda: 1j,
    "a huge int": lambda: 10**5000, "-1": lambda: -1,
    "NaN": lambda: math.nan, "inf": lambda: math.inf, "True": lambda: True, "a huge string": lambda: "x" * 100_000, "bytes": lambda: b"\xff\0",
    "a dict": lambda: {"z": 1},
    "a set": lambda: {1, 2}, "a generator": lambda: (i for i in range(3)), "an iterator": lambda: iter([1, 2]),
    "a raising iterator": lambda: map(boom, [1]),
    "an array": lambda: np.ones((2, 2)), "an object array": lambda: np.array([None, "x"], object), "a numpy float": lambda: np.float32(1),
    "a NaN array": lambda: np.full(3, np.nan),
    "a structured array": lambda: np.zeros(2, [("a", "f4")]), "a module": lambda: nn.Linear(2, 2), "an empty ModuleList": nn.ModuleList,
    "a python module": lambda: sys,
    "a class": lambda: dict, "a function": lambda: boom, "a coroutine": lambda: coroutine(), "an exception": lambda: ValueError("x"),
    "a torch.Size": lambda: torch.Size([2]),
    "a ragged list": lambda: [[1], [2, 3]], "a list of itself": lambda: [loop := [], loop.append(loop)][0],
    "a lazy module": lambda: nn.LazyLinear(2), "a dtype": lambda: torch.float32,
    "a subclass of tuple": lambda: type("T", (tuple,), {"__iter__": boom, "__len__": boom})((1, 2)),
    "a subclass of list": lambda: type("L", (list,), {"__iter__": boom})([1]),
}


async def coroutine():
    pass


def values():
    """Behaviours that return: tensors of all kinds, objects that bite, and tuples, lists, sets and dicts of them."""
    from hypothesis import strategies as st

    def of_tensor(dtype, form, shape, fill):
        return Behaviour(f"tensor({dtype}, {form}, {shape}, {fill})", lambda like, args: tensor(dtype, form, shape, FILLS[fill], like))

    def of_many(kind, inner):
        def act(like, args):
            found = [b.act(like, args) for b in inner]
            return dict(enumerate(found)) if kind is dict else kind(found)
        return Behaviour(f"{kind.__name__}({', '.join(b.name for b in inner)})", act)

    tensors = st.builds(of_tensor, *map(st.sampled_from, (DTYPES, FORMS, SHAPES, list(FILLS))))
    things = st.sampled_from([Behaviour(name, lambda like, args, make=make: make()) for name, make in OBJECTS.items()])
    texts = st.one_of(st.text(max_size=8), st.binary(max_size=8), st.integers(), st.floats()).map(lambda v: Behaviour(ascii(v), lambda like, args: v))
    leaves = st.one_of(tensors, tensors, things, texts)
    return leaves | st.recursive(leaves, lambda inner: st.builds(of_many, st.sampled_from((tuple, tuple, list, set, dict)),
        st.lists(inner, max_size=3)), max_leaves=6)


def raised(error):
    raise error() if not isinstance(error, BaseException) else error


def recurse():
    return recurse()


ENTERED = []  # contexts that are never left; kept, since some leave themselves when they are let go


def enter(context):
    ENTERED.append(context)
    context.__enter__()


HOSTILE = {"a raising __str__": {"__str__": boom, "__repr__": boom}, "a __str__ of nonsense": {"__str__": lambda self: 7},
    "a raising __getattr__": {"__getattr__": boom},
           "a raising __getattribute__": {"__getattribute__": boom}, "a raising __class__": {"__class__": property(boom)},
           "a false flag": {"reference_blocked": property(boom)}}
ERRORS = {e.__name__: (lambda e=e: e("message")) for e in (
    ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError, AssertionError, OSError, EOFError,
        NotImplementedError, ImportError,
    StopIteration, StopAsyncIteration, GeneratorExit, SystemExit, MemoryError, RecursionError, BaseException, UserWarning, torch.OutOfMemoryError,
    FloatingPointError)}
ERRORS |= {f"{base.__name__} with {name}": (lambda base=base, body=body: type("Hostile", (base,), body)("m")) for base in (Exception, BaseException,
    NotImplementedError)
           for name, body in HOSTILE.items()}
ERRORS |= {
    "an exception of many lines": lambda: ValueError("a\nb\r\n\v\f\x1c\x85\u2028c" * 200),
        "an exception with a lone surrogate": lambda: ValueError("\ud800"),
    "an exception with a strange name": lambda: type("two\nlines" + "x" * 700, (Exception,), {})(),
    "a long stub": lambda: NotImplementedError("exercise " + "x" * 900),
    "an exception of a hostile metaclass": lambda: META("Hostile", (Exception,), {})(),
    "an exception group": lambda: BaseExceptionGroup("g", [ValueError(), SystemExit()]),
    "an empty exception": lambda: Exception(), "a NUL": lambda: ValueError("\0"), "no exception at all": lambda: 7,
}
WORLD = {
    "prints a lot": lambda: [print(MARK, i) for i in range(3000)], "writes to stderr": lambda: print(MARK, file=sys.stderr),
        "writes to fd 1 and 2": lambda: [os.write(i, MARK.encode()) for i in (1, 2)],
    "prints bytes that are no text": lambda: os.write(1, b"\xff\xfe"), "prints a lone surrogate": lambda: print("\ud800"),
    "warns": lambda: warnings.warn(MARK, stacklevel=1),
    "float16 by default": lambda: torch.set_default_dtype(torch.float16), "float32 by default": lambda: torch.set_default_dtype(torch.float32),
    "no gradients": lambda: torch.set_grad_enabled(False),
    "enters no_grad": lambda: torch.no_grad().__enter__(), "a seed": lambda: (torch.manual_seed(1), np.random.seed(1), random.seed(1)),
    "threads": lambda: torch.set_num_threads(2),
    "meta device by default": lambda: torch.set_default_device("meta"), "closes stdout": lambda: sys.stdout.close(),
    "closes stderr": lambda: sys.stderr.close(), "closes fd 1": lambda: os.close(1),
    "sets stdout to None": lambda: setattr(sys, "stdout", None), "sets stdout to nonsense": lambda: setattr(sys, "stdout", 7),
    "warnings as errors": lambda: (warnings.simplefilter("error"), warnings.warn(MARK, stacklevel=1)),
    "later warnings as errors": lambda: warnings.simplefilter("error"), "numpy errors raise": lambda: np.seterr(all="raise"),
    "changes folder": lambda: os.chdir("/"),
    "removes its folder": lambda: (os.chdir(folder := tempfile.mkdtemp()), os.rmdir(folder)),
    "enters inference mode for good": lambda: enter(torch.inference_mode()),
    "enters autocast": lambda: enter(torch.autocast("cpu")),
    "enters a mode for functions that raises": lambda: enter(type("Mode", (TorchFunctionMode,), {"__torch_function__": boom})()),
    "enters a mode for operations that raises": lambda: enter(type("Mode", (TorchDispatchMode,), {"__torch_dispatch__": boom})()),
    "a recursion limit": lambda: sys.setrecursionlimit(len(inspect.stack(0)) + 40),
    "deletes stderr": lambda: delattr(sys, "stderr"),
    "warnings raise when they are shown": lambda: (setattr(warnings, "showwarning", boom), warnings.warn(MARK, stacklevel=1)),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "recursion": recurse, "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "leaves garbage that bites": lambda: (o := OBJECTS["an object whose __del__ raises"](), setattr(o, "me", o)),
}


def actions():
    """Behaviours that raise, change the world or spoil their arguments; what does not raise lets the original go on."""
    from hypothesis import strategies as st

    def spoil(target, value):
        def act(like, args):
            for a in args:
                with contextlib.suppress(Exception):
                    thing = value.act(a, ())
                    if isinstance(a, nn.Module) and target not in ("data", "grad"):
                        a.__dict__[target] = thing
                    else:
                        for p in a._parameters.values() if isinstance(a, nn.Module) else [a]:
                            setattr(p, target, thing)
            return GO_ON
        return Behaviour(f"sets .{target} of its arguments to {value.name}", act)

    raising = st.sampled_from([Behaviour(f"raises {n}", lambda like, args, make=make: raised(make())) for n, make in ERRORS.items()])
    world = st.sampled_from([Behaviour(n, lambda like, args, do=do: (do(), GO_ON)[1]) for n, do in WORLD.items()])
    whole = values().filter(lambda value: not any(form in value.name for form in HOLLOW))
    return st.one_of(raising, world, st.builds(spoil, st.sampled_from(("data", "grad", "a", "theta", "diary", "log_prob")), whole))


def wrapped(original, behaviour, when, part):
    """`original`, or the behaviour at those calls; with `part` only that entry of the tuple or list that comes back is replaced."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        out = GO_ON
        if next(calls) in when:
            like = next((a for a in args if type(a) is torch.Tensor), None)
            if part is None:
                out = behaviour.act(like, args)
            else:
                right = original(*args, **kwargs)
                if type(right) not in (tuple, list):
                    out = behaviour.act(right, args)
                else:
                    made = [behaviour.act(v, args) if i == part else v for i, v in enumerate(right)]
                    out = type(right)(right[i] if v is GO_ON else v for i, v in enumerate(made))
        return original(*args, **kwargs) if out is GO_ON else out

    return call


WHEN = {"always": range(10**9), "at the first call": (1,), "at the second call": (2,), "from the third call on": range(3, 10**9)}
SPOTS = ("__init__", "__new__", "forward", "forward", "inverse", "inverse", "parameters", "state_dict", "load_state_dict", "__call__",
    "named_parameters")


class Plain:
    """The smallest layer: it keeps its argument, and changes nothing."""

    def __init__(self, *args):
        self.args = args

    def forward(self, x):
        return x, torch.zeros(len(x))

    def inverse(self, z):
        return z


def spoilt(base, spots):
    """A subclass of `base` that misbehaves at `spots`: (method, behaviour, when, part); part "attribute" spoils the look-up itself."""
    body = {}
    for name, behaviour, when, part in spots:
        original = body.get(name) or getattr(base, name, boom)
        if part == "attribute":
            look = wrapped(lambda self, name=name: getattr(super(made, self), name, boom), behaviour, WHEN[when], None)
            body[name] = property(look)
        elif not isinstance(original, property):
            def method(*args, call=wrapped(original if name != "__new__" else lambda cls, *a, **k: object.__new__(cls), behaviour, WHEN[when], part),
                **kwargs):
                return call(*args, **kwargs)
            body[name] = method
    made = type("Spoilt", (base,), body)
    return made


@dataclass(frozen=True)
class Handed:
    """What a student hands in: `make()` gives the objects for `check`."""

    name: str
    make: Callable


def objects_for(exercise_id):
    """What could be handed in for an exercise: spoilt classes, functions, things that are neither, too many; half-right ones above all."""
    from hypothesis import strategies as st

    reference, *others = records.registry()[exercise_id].reference()     # of several objects the first is spoilt
    behaviours = values() | actions()
    when = st.sampled_from(("always", "always", *WHEN))
    layer = isinstance(reference, type)
    right_class = reference if layer else type(reference()) if exercise_id == "make_net" else Plain
    Module = type("Module", (nn.Module,), {"__init__": lambda self,
        *a: (nn.Module.__init__(self), setattr(self, "w", nn.Parameter(torch.ones(2))))[0],
                                           "forward": Plain.forward, "inverse": Plain.inverse})

    def made(value):
        try:
            return value.act(None, ())
        except Exception as e:  # torch refuses to make some tensors
            return e

    def name(spots):
        return "; ".join(f"{n} {w}{'' if p is None else f' [{p}]'}: {b.name}" for n, b, w, p in spots)

    def a_class(base, spots):
        return Handed(f"{base.__name__} with {name(spots)}", lambda: (spoilt(base, spots), *others))

    def a_function(spot):
        _, behaviour, w, part = spot
        return Handed(f"function, {name([spot])}", lambda: (wrapped(reference, behaviour, WHEN[w], part), *others))

    def a_net(spots):
        def make():
            net = reference()
            net.__class__ = spoilt(type(net), spots)
            return net
        return Handed(f"net with {name(spots)}", lambda: (make,))

    half = st.tuples(st.sampled_from(("forward", "inverse") if layer or exercise_id == "make_net" else ("call",)), behaviours, when,
        st.sampled_from((0, 1)))
    spots = st.lists(st.tuples(st.sampled_from(SPOTS), behaviours, when, st.sampled_from((None, None, None, "attribute", 0, 1))), min_size=1,
        max_size=3)
    whole = st.builds(a_class, st.sampled_from((right_class, right_class, Plain, Module)), spots)
    calls = st.builds(a_function, st.tuples(st.just("call"), behaviours, when, st.none()) | half)
    bare = st.builds(lambda v: Handed(f"no answer at all: {v.name}", lambda: (made(v),)), values())
    many = st.builds(lambda v, n: Handed(f"{n} objects: {v.name}", lambda: (reference, *(made(v) for _ in range(n - 1)))), values(),
        st.integers(2, 3))
    halves = st.builds(a_class, st.just(reference), half.map(lambda s: [s])) if layer else st.builds(a_net,
        spots) if exercise_id == "make_net" else calls
    weights = ((halves, 9), (whole, 6), (calls, 2), (bare, 2), (many, 1))
    return st.sampled_from([i for i, (_, weight) in enumerate(weights) for _ in range(weight)]).flatmap(lambda i: weights[i][0])


def world():
    """The state of the process that no answer may leave changed."""
    return {"default dtype": torch.get_default_dtype(), "grad mode": torch.is_grad_enabled(), "default device": str(torch.get_default_device()),
            "inference mode": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
            "threads": torch.get_num_threads(),
            "anomaly mode": torch.is_anomaly_enabled(), "determinism": torch.are_deterministic_algorithms_enabled(),
            "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
            "numpy errors": str(np.geterr()), "warning filters": str(warnings.filters), "showing warnings": warnings.showwarning,
            "stdout": id(sys.stdout), "stderr": id(sys.stderr), "folder": os.getcwd(), "recursion limit": sys.getrecursionlimit()}


class Leak(Exception):
    """Something got out that is not a clear sentence."""


@contextlib.contextmanager
def fenced(said):
    """File descriptors 1 and 2 go to files, whose text is added to `said`; afterwards the world is as it was. Leak if it was left changed."""
    changed = []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, settings_kept():
        saved = [os.dup(1), os.dup(2)]
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (mine := [io.TextIOWrapper(os.fdopen(os.dup(n), "wb"), "utf-8", write_through=True) for n in (1, 2)])
        inside = world()
        try:
            yield
        finally:
            changed = [k for k, v in world().items() if v != inside[k]]
            for descriptor, number in zip(saved, (1, 2)):
                os.dup2(descriptor, number), os.close(descriptor)
            for stream in mine:
                with contextlib.suppress(Exception):
                    stream.close()
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode("utf-8", "replace"))
    if changed:
        raise Leak(f"left changed: {', '.join(changed)}")


def clear(sentence):
    if not isinstance(sentence, str) or not sentence.strip() or len(sentence) > LONGEST or len(sentence.splitlines()) > 1:
        raise Leak(f"no clear sentence ({len(sentence)} characters): {sentence[:200]!r}")


def judged(exercise, seed, arrays):
    """Run the cases, and of the diagnosis what reads the answer's outputs; Leak unless every lost point has its sentence."""
    answers, outputs = judge.bank(exercise, seed), records.Outputs(arrays)
    results = judge.run_cases(exercise, answers, outputs)
    judge.features(exercise, answers.inputs, outputs)
    if exercise.faults is not None:
        with contextlib.suppress(records.Fail):
            exercise.faults(answers.inputs, outputs)
    for result in results:
        if result.earned < result.points:
            clear(result.sentence)
    score = float(sum(r.earned for r in results))
    if not (math.isfinite(score) and 0 <= score <= exercise.points):
        raise Leak(f"a score of {score}")
    if score < exercise.points:
        clear(judge.fallback(results))


def thin(inputs):
    """The inputs with a few points for the picture, which no case reads, instead of thousands."""
    return {k: np.array(4) if k.endswith("grid lines") else v[:8] if k.endswith("grid") else v for k, v in inputs.items()}


def by_parts(exercise, handed, seed):
    """Probe, then judge, in the world as the answer left it."""
    with fenced([]):
        with captured():
            arrays = exercise.probe(handed.make(), thin(judge.bank(exercise, seed).inputs))
        if any(type(v) is not np.ndarray or v.dtype.hasobject for v in arrays.values()):
            raise Leak("the probe returned something that is not a plain array")
        with captured():
            judged(exercise, seed, arrays)


def by_check(exercise, handed, seed):
    """`check` itself, with its diagnosis: nothing but the verdict may be written, nothing to stderr, and the bank stays as it was."""
    said, answers = [], judge.bank(exercise, seed)
    right = answers.reference[1]
    kept = dict(answers.cache)
    answers.cache.pop("reference")  # check computes it after the student's code has run
    try:
        with mock.patch.dict(os.environ, {"NBGRADER_EXECUTION": "1", "AUTOGRADER_SEED": str(seed)}):  # nothing is recorded
            gc.freeze()  # so that the collection below, where a __del__ of what check left behind would speak, looks at nothing older
            with fenced(said), mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
                score = check(exercise.id, *handed.make())
                gc.collect()
        if not (type(float(score)) is float and 0 <= score <= exercise.points):
            raise Leak(f"a score of {score}")
        if said[1] or not said[0].startswith(exercise.id + ": ") or any(line.startswith(MARK) for line in said[0].splitlines()):
            raise Leak(f"written outside of the capture: {said[0][:200]!r}, to stderr {said[1][-400:]!r}")
        if not all(np.array_equal(v, right[k], equal_nan=v.dtype.kind == "f") for k, v in answers.reference[1].items()):
            raise Leak("the answer changed the reference's outputs")
    finally:
        answers.cache = kept
        gc.unfreeze()


def told():
    """The exception in flight with its traceback; a hostile one is not asked for its words."""
    kind, _, trace = sys.exc_info()
    try:
        return traceback.format_exc()
    except BaseException:
        return "".join(traceback.format_tb(trace)) + f"{type.__dict__['__name__'].__get__(kind)} (it cannot be printed)"


def crashes(exercise_id, inputs, seed=0, every=10):
    """[(description, traceback)] of what went wrong in `inputs` random answers; each `every`th goes through `check` as well."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    exercise, found, count = records.registry()[exercise_id], [], itertools.count()
    with captured():
        exercise.probe(exercise.reference(), judge.bank(exercise, 0).inputs), judge.judge(exercise, 0, {})  # so that the bank is full

    @seeded(seed)
    @settings(max_examples=inputs, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(objects_for(exercise_id))
    def attempt(handed):
        for way in (by_parts, by_check) if next(count) % every == 0 else (by_parts,):
            try:
                way(exercise, handed, 0)
            except KeyboardInterrupt:
                raise
            except BaseException:
                found.append((f"{way.__name__}: {handed.name}", told()))

    attempt()
    return found
