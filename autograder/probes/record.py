"""A run of an answer, written down as arrays.

`Record` is the dict of arrays that every probe returns. A step of a probe (construct, forward, inverse, ...) either
leaves its values under "step.name", or, when it raised or returned something of the wrong kind, one complaint under
"step!": a pair (kind, sentence), kind being one of KINDS. So whatever a student's code does, what leaves the probe
is a dict of plain arrays that can be written without pickle.

A student's code runs inside `Record.run` and nowhere else: also parameters(), len() of what it returned, and a tensor of
a class of its own. What a probe works on afterwards is `plain`.
"""
import contextlib
import os
import random
import sys
import types
import warnings

import numpy as np
import torch
from torch import nn

KINDS = ("unsolved", "raised", "type", "blocked")
LARGEST = 4_000_000  # numbers in one array: far above anything that an exercise asks for
UNSOLVED = "not solved yet"


class Stop(Exception):
    """A step failed; its complaint is recorded, the steps that need it are not run."""


class Complaint(Exception):
    """What is wrong with a returned value, in one sentence."""


class Record(dict):
    def complain(self, step, kind, sentence):
        # One line that can be printed anywhere; a full stop may still be added.
        text = " ".join(str(sentence).split())[:599].encode("utf-8", "replace").decode()
        self[step + "!"] = np.array([kind, text])

    def run(self, step, call):
        """The value of `call()`; on any failure records the complaint and raises Stop.

        SystemExit and whatever else student code may throw is caught; KeyboardInterrupt is the person at the
        keyboard and passes. What the call set for the whole process is set back.
        """
        try:
            with settings_kept():
                return call()
        except (KeyboardInterrupt, Stop):
            raise
        except NotImplementedError as e:
            text = one_line(e)  # a stub's own names its exercise; torch raises this error for things of its own
            stub = not text or text.startswith("exercise ")
            self.complain(step, "unsolved" if stub else "raised", text or UNSOLVED)
        except Complaint as e:
            self.complain(step, "type", e)
        except MemoryError:
            self.complain(step, "raised", f"{words(step)} ran out of memory")
        except BaseException as e:  # a student's class may raise anything at all
            if type(e) is RuntimeError and "inplace" in one_line(e):  # torch has many words for it
                self.complain(step, "raised", f"{words(step)} failed: a tensor that the gradient needs was overwritten in place")
                raise Stop(step) from None
            self.complain(step, "blocked" if blocked(e) else "raised", f"{words(step)} raised {name_of(type(e))}{colon(one_line(e))}")
        raise Stop(step)

    def one(self, step, call, name):
        """Record the tensor that `call()` returns as "step.name", and return it."""
        return self.many(step, call, name)[0]

    def many(self, step, call, *names):
        """Record the tensors that `call()` returns (a tuple for several names), and return them, `plain`.

        A value of the wrong kind leaves its own complaint under "step.name!" and does not spoil the others; without a
        usable first one (z of z, ldj) the step has failed.
        """
        values = self.run(step, lambda: parts(words(step), call(), *names))
        found = []
        for name, value in zip(names, values):
            try:
                value, self[f"{step}.{name}"] = readable(words(step), name, value)
                found.append(value)
            except Complaint as e:
                self.complain(f"{step}.{name}" if len(names) > 1 else step, "type", e)
                found.append(None)
        if found[0] is None:
            raise Stop(step)
        return found

    def keep(self, key, call):
        """Record under the key itself what `call()` gives: a number, an array, or a tensor of the probe's own that an answer may have spoilt."""
        def array():
            value = call()
            return to_array("the answer", key, value) if issubclass(type(value), torch.Tensor) else np.array(value)

        self[key] = self.run(key, array)


def words(step):
    """A step as a student reads it: "D=6 forward" -> "forward (with D = 6)"."""
    if step.startswith("D="):
        size, _, rest = step.partition(" ")
        return f"{rest} (with D = {size[2:]})"
    return step


def parts(step, value, *names):
    """A returned value as a list with one entry for each name, or a Complaint."""
    if type(value) is types.GeneratorType:
        raise Complaint(f"{step} returned a generator (is there a `yield` in it?) where {wanted(names)} is expected")
    if len(names) == 1:
        return [value]
    if type(value) not in (tuple, list):
        raise Complaint(f"{step} should return {wanted(names)}; it returned {describe(value)}")
    if len(value) != len(names):
        raise Complaint(f"{step} should return {wanted(names)}; it returned {len(value)} values")
    return list(value)


def unpack(step, value, *names):
    """[(tensor, array), ...] of a returned value, one for each name, the tensors `plain`; a Complaint unless it holds that."""
    return [readable(step, n, v) for n, v in zip(names, parts(step, value, *names))]


def wanted(names):
    return names[0] if len(names) == 1 else f"a tuple ({', '.join(names)})"


def describe(value):
    """A value in words, without calling anything that belongs to it."""
    kind = type(value)
    if value is None:
        return "None (is a `return` missing?)"
    if kind in (tuple, list):
        return f"a {kind.__name__} of {len(value)}"
    if kind in (int, float, bool):
        return f"the {kind.__name__} {value!r}" if kind is not int or abs(value) < 10**20 else "a very large int"
    if kind is np.ndarray:
        return "a numpy array"
    if kind is torch.Tensor:
        with contextlib.suppress(Exception):  # a nested tensor has no shape, one that left vmap may not be looked at
            return f"one tensor of shape {tuple(value.shape)}"
    return f"an object of type {name_of(kind)}"


def plain(label, value):
    """A student's tensor as a torch.Tensor by its true type, with its graph: dense, real, in the CPU's memory; or a Complaint.

    torch itself can crash on an object that only says it is a tensor, or on one that was left without memory.
    """
    if not issubclass(type(value), torch.Tensor):  # isinstance would believe an overridden __class__
        raise Complaint(f"{label} should be a torch.Tensor; it is {describe(value)}")
    if type(value) is not torch.Tensor:
        value = torch.Tensor.as_subclass(value, torch.Tensor)
    if value.is_nested or value.layout != torch.strided or value.is_complex() or value.is_quantized:
        layout = "nested" if value.is_nested else value.layout
        raise Complaint(f"{label} should be a dense real tensor; it is {layout}, {value.dtype}")
    if value.device.type != "cpu":
        raise Complaint(f"{label} lives on the device {value.device}, the input on the CPU")
    if value.numel() > LARGEST:
        raise Complaint(f"{label} has {value.numel()} entries, shape {tuple(value.shape)}: far too many")
    last = value.storage_offset() + sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
    if value.numel() and (value.data_ptr() == 0 or value.untyped_storage().nbytes() < (last + 1) * value.itemsize):
        raise Complaint(f"{label} has shape {tuple(value.shape)}, but no memory that holds its numbers")
    return value


def readable(step, name, value):
    """A student's tensor `plain`, and as a numpy array: float32, float64, or int64 for integers and booleans; or a Complaint."""
    label = f"{step}: {name}" if name != step else step
    try:
        with torch._C.DisableTorchFunctionSubclass():
            value = plain(label, value)
            numbers = value.detach()
            if not numbers.is_floating_point():
                numbers = numbers.long()  # numpy cannot subtract booleans
            elif numbers.dtype != torch.float64:
                numbers = numbers.float()
            return value, numbers.resolve_neg().contiguous().numpy().copy()
    except (KeyboardInterrupt, Complaint):
        raise
    except BaseException:  # a class of tensors may answer any operation as it likes, and torch's own words explain nothing
        raise Complaint(f"{label} is a tensor that cannot be read: no numbers can be taken out of it") from None


def to_array(step, name, value):
    """A student's tensor as a numpy array on the CPU, or a Complaint."""
    return readable(step, name, value)[1]


def to_float(step, name, value, kind="a float"):
    """A student's number (a Python or numpy float, or a tensor with one entry) as an array, or a Complaint that asks for `kind`."""
    if issubclass(type(value), torch.Tensor):
        array = to_array(step, name, value)
        if array.size != 1:
            raise Complaint(f"{step}: {name} should be {kind}; it is a tensor of shape {array.shape}")
        return array.reshape(()).astype(float)
    if type(value) in (int, float, np.float32, np.float64):
        return np.array(float(value))
    raise Complaint(f"{step}: {name} should be {kind}; it is {describe(value)}")


def blocked(error):
    """Whether an exception is the class run's refusal to import a reference."""
    try:
        return error.reference_blocked is True
    except BaseException:  # an exception of the student's own may raise when it is looked at
        return False


def name_of(kind):
    """The name of a type, by type's own means: a metaclass may have others in mind."""
    return " ".join(str(type.__dict__["__name__"].__get__(kind)).split())[:60]


def one_line(error):
    try:
        text = " ".join(str(error).split())
    except BaseException:  # an exception whose own __str__ raises still gets its sentence
        return ""
    return text if len(text) < 300 else text[:297] + "..."


def colon(text):
    return f": {text}" if text else ""


def folder():
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def set_filters(filters):
    warnings.filters[:] = filters
    with warnings.catch_warnings():  # tells the module that its filters are others now
        pass


INFERENCE = []  # the guards that end a student's inference mode; one that is let go would bring it back


def set_inference(on):
    INFERENCE.append(torch._C._InferenceMode(on))
    INFERENCE[-1].__enter__()


SETTINGS = (  # what student code may set for the whole process: how to ask, how to set
    (torch.is_inference_mode_enabled, set_inference),
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    (np.geterr, lambda how: np.seterr(**how)),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (folder, lambda path: path and os.chdir(path)),
)


@contextlib.contextmanager
def settings_kept():
    """The CPU as default device inside; afterwards SETTINGS, default device, torch's modes, streams and warning filters as before."""
    device, streams = torch.get_default_device(), (sys.stdout, sys.stderr)
    filters, entries, show = warnings.filters, list(warnings.filters), warnings.showwarning
    torch.set_default_device(None)
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    before = [ask() for ask, _ in SETTINGS]
    def set_back():
        sys.stdout, sys.stderr = streams
        torch.set_default_device(None)
        for _ in range(torch._C._len_torch_function_stack() - modes[0]):
            torch._C._pop_torch_function_stack()
        for _ in range(torch._C._len_torch_dispatch_stack() - modes[1]):
            torch._C._pop_torch_dispatch_stack(None)
        for (ask, put), value in zip(SETTINGS, before):
            if ask() != value:
                put(value)
        warnings.filters, warnings.showwarning = filters, show
        if list(map(id, filters)) != list(map(id, entries)):
            set_filters(entries)
        if torch.get_default_device() != device:  # it may also come from a `with torch.device(...)` around the check
            torch.set_default_device(device)

    try:
        yield
    finally:
        with torch._C.DisableTorchFunction():  # a mode around the check, which may raise, has no say in this
            set_back()


@contextlib.contextmanager
def quiet_world(seed=0):
    """Float64 and the CPU by default and seeded generators inside; all that student code may set is as it was afterwards.

    With float64 as default, a tensor that a student makes inside a layer (torch.zeros(...)) has the precision that
    the judge's differences need.
    """
    state, numpy_state = random.getstate(), np.random.get_state()
    with settings_kept(), torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also tell the devices that are not used, each time in a few milliseconds.
        torch.default_generator.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def tensor(array, dtype=torch.float64):
    """An input array as a fresh tensor, so that a change in place cannot reach the judge's copy."""
    t = torch.from_numpy(np.array(array))
    return t.to(dtype) if t.is_floating_point() else t


def bijection(record, step, layer, inputs):
    """What the laws of a bijective layer need: forward and inverse on the judge's points.

    inputs "x" (B, D), "near" (N, D) points around x for difference quotients, "z" (B, D) for the inverse;
    optional "grid" (N, 2) for the picture, the first "grid lines" points of which are also carried back. `step` is a prefix such as "D=2 ".
    """

    def attempt(call):
        with contextlib.suppress(Stop):
            call()

    def forward():
        x = tensor(inputs["x"])
        z, _ = record.many(step + "forward", lambda: layer.forward(x), "z", "ldj")
        record.keep(step + "x after", lambda: x)
        record.one(step + "inverse of forward", lambda: layer.inverse(z.detach().double()), "x")

    def near():
        record.many(step + "forward near", lambda: layer.forward(tensor(inputs["near"])), "z", "ldj")

    def inverse():
        z = tensor(inputs["z"])
        x = record.one(step + "inverse", lambda: layer.inverse(z), "x")
        record.keep(step + "z after", lambda: z)
        record.many(step + "forward of inverse", lambda: layer.forward(x.detach().double()), "z", "ldj")

    def row():
        record.many(step + "forward of one row", lambda: layer.forward(tensor(inputs["x"][:1])), "z", "ldj")

    attempt(forward), attempt(near), attempt(inverse), attempt(row)

    def picture():
        z, _ = record.many(step + "picture", lambda: layer.forward(tensor(inputs["grid"])), "z", "ldj")
        lines = int(inputs["grid lines"])  # the first of the grid's points; the others are for the density
        record.one(step + "picture back", lambda: layer.inverse(z.detach()[:lines].double()), "x")

    if "grid" in inputs:
        attempt(picture)


def is_module(value):
    """Whether it is an nn.Module by its true type."""
    return issubclass(type(value), nn.Module)


def parameters(step, *modules):
    """The parameters of those of `modules` that are nn.Modules; a Complaint if one is none. To be called inside Record.run."""
    found = [p for m in modules if is_module(m) for p in m.parameters()]
    for p in found:
        readable(step, "a parameter", p)
    return found


def saved(step, module):
    """The state_dict of a module, of which torch could copy every tensor. To be called inside Record.run."""
    state = module.state_dict()
    for value in state.values():
        if issubclass(type(value), torch.Tensor):
            readable(step, "a tensor in state_dict", value)
    return state


def part(inputs, prefix):
    """The entries of `inputs` whose names start with `prefix`, without it."""
    return {k[len(prefix):]: v for k, v in inputs.items() if k.startswith(prefix)}
