"""Laws that every right bijective layer obeys, judged on arrays alone.

A law compares what came back from a student's layer with numbers that the judge computes itself: the Jacobian of the
student's own forward by difference quotients (never by the student's autograd), the input that was sent, a seeded
set of points. All laws take the step prefix of autograder.probes.record.bijection ("" or "D=6 ").
"""
import itertools
import math

import numpy as np

from autograder.exercise import Fail

STEP = 1e-2  # of the difference quotients: fourth order, so 1e-8 of error in float64 and about 1e-5 in float32
OFFSETS = np.array([-2.0, -1.0, 1.0, 2.0])
WEIGHTS = np.array([1.0, -8.0, 8.0, -1.0]) / 12


def near(x, h=STEP):
    """The points (B * D * 4, D) around x (B, D) that `jacobian` needs."""
    B, D = x.shape
    steps = h * OFFSETS[:, None] * np.eye(D)[:, None, :]  # (D, 4, D)
    return (x[:, None, None, :] + steps[None]).reshape(-1, D)


def jacobian(f_near, shape, h=STEP):
    """dz/dx (B, D, D), [b, out, in], from the values f_near (B * D * 4, D) at `near(x)`."""
    B, D = shape
    return np.einsum("bikz,k->bzi", f_near.reshape(B, D, 4, D).astype(float), WEIGHTS) / h


def tolerance(array):
    return 2e-3 if array.dtype == np.float32 else 1e-5


def point(x, digits=3):
    """A point in words."""
    return "(" + ", ".join(f"{v:.{digits}g}" for v in np.atleast_1d(x)) + ")"


def expected(want, got):
    """What was expected and what came, with as many digits as it takes to see the difference."""
    digits = next((d for d in range(3, 17) if point(want, d) != point(got, d)), 17)
    digits = min(17, digits + (digits > 3))
    return f"expected {point(want, digits)}, got {point(got, digits)}"


def first_bad(x, wrong):
    """The index of the row with the smallest input among those that are wrong: the easiest to compute by hand."""
    size = np.abs(x).reshape(len(x), -1).max(1)
    return int(np.where(wrong, size, np.inf).argmin())


def close(got, want, tol):
    return np.abs(got.astype(float) - want) <= tol * (1 + np.abs(want))


def expect(name, x, got, want, tol=None, why=""):
    """Row by row equality of a student's array with the judge's; Fail names the smallest input that shows a difference."""
    if got.shape != want.shape:
        raise Fail(f"`{name}` has shape {got.shape}; it should be {want.shape}.")
    wrong = ~close(got, want, tolerance(got) if tol is None else tol).reshape(len(x), -1).all(1)
    if wrong.any():
        i = first_bad(x, wrong)
        raise Fail(f"`{name}` is not what it should be{why}.",
                   f"x = {point(x[i])}: {expected(want[i], got[i])}")


def shapes(inputs, outputs, prefix=""):
    """z and x are (B, D), ldj is (B,), also for a batch of one row."""
    x = inputs[prefix + "x"]
    B, D = x.shape
    checks = [("forward.z", (B, D)), ("forward.ldj", (B,)), ("inverse.x", (B, D)),
              ("forward of one row.z", (1, D)), ("forward of one row.ldj", (1,))]
    for key, shape in checks:
        got = outputs[prefix + key].shape
        if got != shape:
            step, name = key.rsplit(".", 1)
            one = " for a batch of one row" if "one row" in step else ""
            step = "inverse" if step == "inverse" else "forward"
            letters = "(B, D)" if len(shape) == 2 else "(B,)"
            raise Fail(f"`{name}` from {step} has shape {got}{one}; it should be {letters} = {shape}.")


def own_jacobian(inputs, outputs, prefix=""):
    """The Jacobian of the student's forward at x, and its log|det| (B,); Fail if z has no usable shape. An input "step" replaces STEP."""
    x = inputs[prefix + "x"]
    z = outputs[prefix + "forward near.z"]
    if z.shape != (x.size * 4, x.shape[1]):
        raise Fail(f"`z` from forward has shape {z.shape} for an input of shape {(x.size * 4, x.shape[1])}.")
    J = jacobian(z, x.shape, float(inputs.get("step", STEP)))
    with np.errstate(divide="ignore"):
        return J, np.linalg.slogdet(J)[1]


def moves(inputs, outputs, prefix=""):
    """The layer does something: a map that returns x has nothing to measure and nothing to undo."""
    x, z = inputs[prefix + "x"], outputs[prefix + "forward.z"]
    if z.shape == x.shape and np.abs(z - x).max() < 1e-9:
        raise Fail("forward returns x unchanged, so there is nothing here to judge yet.")


def ldj_is_log_det(inputs, outputs, prefix=""):
    """ldj = log|det dz/dx| of the student's own forward, row by row."""
    moves(inputs, outputs, prefix)
    x = inputs[prefix + "x"]
    ldj = outputs[prefix + "forward.ldj"]
    _, want = own_jacobian(inputs, outputs, prefix)
    if not np.isfinite(want).all():
        raise Fail("forward squeezes the space flat: its Jacobian determinant is zero, so it has no inverse.")
    if ldj.size != len(x):
        raise Fail(f"`ldj` has shape {ldj.shape} for {len(x)} points; it should hold one number for each, shape (B,).")
    tol = max(tolerance(ldj), tolerance(outputs[prefix + "forward near.z"]))
    wrong = ~close(ldj.reshape(-1), want, tol)
    if wrong.any():
        i = first_bad(x, wrong)
        raise Fail("`ldj` is not log|det dz/dx| of your own forward.",
                   f"x = {point(x[i])}: its Jacobian gives {want[i]:.4g}, your ldj is {ldj.reshape(-1)[i]:.4g}")


def round_trip(inputs, outputs, prefix="", tol=1e-6):
    """inverse(forward(x)) = x and forward(inverse(z)) = z."""
    moves(inputs, outputs, prefix)
    for given, key, words in ((prefix + "x", prefix + "inverse of forward.x", "inverse(forward(x))"),
                              (prefix + "z", prefix + "forward of inverse.z", "forward(inverse(z))")):
        want, got = inputs[given], outputs[key]
        if got.shape != want.shape:
            raise Fail(f"{words} has shape {got.shape}; it should be {want.shape}.")
        loose = 1e-4 if got.dtype == np.float32 else tol
        wrong = ~close(got, want, loose).all(1)
        if wrong.any():
            i = first_bad(want, wrong)
            letter = given[-1]
            raise Fail(f"{words} does not give {letter} back.", f"{letter} = {point(want[i])} comes back as {point(got[i])}")


def untouched(inputs, outputs, prefix=""):
    """The caller's tensors are as they were."""
    moves(inputs, outputs, prefix)
    for given, after, words in (("x", "x after", "forward changed its input `x`"), ("z", "z after", "inverse changed its input `z`")):
        got = outputs[prefix + after]
        if got.shape != inputs[prefix + given].shape or not np.array_equal(got, inputs[prefix + given]):
            raise Fail(f"{words} in place: the caller's tensor was overwritten.")


def rows_apart(inputs, outputs, prefix=""):
    """A row's result does not depend on the other rows of the batch."""
    x = inputs[prefix + "x"]
    z, one = outputs[prefix + "forward.z"], outputs[prefix + "forward of one row.z"]
    if z.shape == x.shape and one.shape == (1, x.shape[1]) and not close(one[0], z[0], tolerance(z)).all():
        raise Fail("The rows of a batch influence each other.",
                   f"x = {point(x[0])} alone gives {point(one[0])}, within the batch {point(z[0])}")


# --- generic faults of a log-determinant: wrong readings of the student's own Jacobian ------------------------------


LDJ_FAULTS = {
    # id: (kind, sentence, log-slopes (B, D) and exact log|det| (B,) -> what a student with this fault returns)
    "ldj_sign": ("sign", "`ldj` has the wrong sign: it is the log-determinant of the inverse map, log|det dx/dz|, where log|det dz/dx| is asked for.",
                 lambda s, L: -L),
    "ldj_zero": ("missing term", "`ldj` is zero everywhere, though your forward does stretch space.", lambda s, L: 0 * L),
    "ldj_det": ("missing function", "`ldj` is the determinant itself; its logarithm is asked for.", lambda s, L: np.exp(L)),
    "ldj_one_number": ("shape", "`ldj` is one number for the whole batch; every row needs its own, shape (B,).",
                       lambda s, L: L.mean() if np.ptp(L) < 1e-6 else np.empty(0)),
    "ldj_times_batch": ("reduction", "`ldj` is multiplied by the size of the batch; every row counts once.", lambda s, L: len(L) * L),
    "ldj_batch_sum": ("reduction", "`ldj` adds up the whole batch; every row needs its own number, shape (B,).", lambda s, L: L.sum()),
    "ldj_batch_sum_kept": ("wrong axis", "`ldj` is summed over the batch instead of over the dimensions.", lambda s, L: s.sum(0)),
    "ldj_batch_mean": ("reduction", "`ldj` is averaged over the whole batch; every row needs its own number, shape (B,).", lambda s, L: L.mean()),
    "ldj_mean": ("reduction", "`ldj` is a mean over the dimensions; the logarithm of a product is a sum.", lambda s, L: L / s.shape[1]),
    "ldj_no_sum": ("shape", "`ldj` still has one number for each dimension: the sum over the dimensions is missing, so its shape is not (B,).",
                   lambda s, L: s),
    "ldj_keepdim": ("shape", "`ldj` has shape (B, 1): the dimension that was summed over is still there.", lambda s, L: L[:, None]),
}


def ldj_faults(inputs, outputs, prefixes=("",)):
    """[(id, kind, place, sentence)] of the generic faults that explain ldj for every prefix, singly or in pairs.

    The truth is the Jacobian of the student's own forward, so this works whatever the parametrisation.
    """
    transformed, truths = [], []
    for prefix in prefixes:
        J, L = own_jacobian(inputs, outputs, prefix)
        diagonal = np.abs(np.einsum("bii->bi", J))
        moved = ~np.isclose(diagonal, 1, atol=1e-6).all(0)
        if not np.isfinite(L).all() or not np.allclose(np.log(np.where(diagonal > 0, diagonal, 1))[:, moved].sum(1), L, atol=1e-4):
            moved[:] = False  # not triangular: the faults of single dimensions do not apply
        transformed.append(np.log(diagonal[:, moved]) if moved.any() else L[:, None])
        truths.append(L)
    got = [outputs[p + "forward.ldj"] for p in prefixes]

    def explains(apply):
        return all(np.shape(w := np.asarray(apply(s, L))) == g.shape and close(g, w, 1e-4).all()
                   for s, L, g in zip(transformed, truths, got))

    if explains(lambda s, L: L):
        return []
    for name, (kind, sentence, apply) in LDJ_FAULTS.items():
        if explains(apply):
            return [(name, kind, "ldj", sentence)]
    signs = ("ldj_sign",)
    for a, b in itertools.product(signs, [n for n in LDJ_FAULTS if n not in signs + ("ldj_zero",)]):
        if explains(lambda s, L: LDJ_FAULTS[b][2](-s, -L)):
            return [(n, LDJ_FAULTS[n][0], "ldj", LDJ_FAULTS[n][1]) for n in (a, b)]
    return []


def directional(values, h=STEP):
    """The derivative along a direction from the four values at -2h, -h, h, 2h; Fail if there are not four."""
    if np.shape(values) != np.shape(WEIGHTS):
        raise Fail("Asked again with inputs that are a little different, the answer returns something of another shape.")
    return float(np.dot(values, WEIGHTS) / h)


def normal_log_prob(z):
    """log N(z; 0, I) (N,) for z (N, D), in nats."""
    return -0.5 * (z**2).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
