"""From nothing to the whole layer: a path of maps h = path(x, tau) with path(x, 0) = x and path(x, 1) = layer(x).

A coupling layer has one that never leaves the invertible maps: multiply the net's answer (alpha and mu) by tau. The same
works for every layer that is the identity where its nets answer zero: mixtures, NICE, residual layers, vector fields. A linear layer of
positive determinant is a rotation after a stretch, and both can be done by degrees. Whatever has neither is shown by straight lines, which
are no maps of their own.
"""
import copy

import torch
from torch import nn

SCALED = "scaled"          # the nets' answers times tau
TURNED = "turned"          # a linear map, by degrees
FLIPPED = "flipped"        # a linear map that turns the plane over: no path of invertible maps leads there
STRAIGHT = "straight"      # straight lines from input to output


def steps_of(flow):
    """The layers of a flow in order, from data to latent: of a Flow, a Compose, a list, an nn.Sequential; else the thing itself."""
    inner = getattr(flow, "transform", None)
    if inner is not None and (hasattr(flow, "base") or not hasattr(flow, "forward")):
        return steps_of(inner)
    parts = getattr(flow, "transforms", flow)
    if isinstance(parts, (list, tuple, nn.ModuleList, nn.Sequential)):
        return [step for part in parts for step in steps_of(part)]
    return [flow]


class Path:
    """h, ldj = path(x, tau) of a layer, with `kind`, one of the four above. The layer is copied; it must take x (N, D)."""

    def __init__(self, layer, x):
        self.name, self.tau = type(layer).__name__, 1.0
        self.layer = _quiet(copy.deepcopy(layer))
        self.kind, self.matrix = STRAIGHT, None
        scaled = self._scaled(layer, x)
        if scaled is not None:
            self.layer, self.kind = scaled, SCALED
        else:
            self._look_for_a_matrix(x)

    @torch.no_grad()
    def __call__(self, x, tau):
        if self.kind == SCALED:
            self.tau = float(tau)
            return self.layer.forward(x)
        z, ldj = self.layer.forward(x)
        if self.kind == TURNED and tau < 1:
            matrix, shift, angle, values, vectors = self.matrix
            z = x @ (_rotation(tau * angle).to(x) @ vectors @ torch.diag(values ** tau) @ vectors.T).T + tau * shift
        elif self.kind != TURNED:
            z = torch.lerp(x, z, tau)
        return z, tau * ldj

    def _scaled(self, layer, x):
        """A copy of the layer whose nets answer self.tau times what they did, if that is a path; else None."""
        for depth in (1, 2, 3):
            trial = _quiet(copy.deepcopy(layer))
            if not self._wrap_nets(trial, depth):
                return None
            if self._is_a_path(trial, x):
                return trial
        return None

    def _wrap_nets(self, part, depth):
        """Wrap what is called `depth` levels below `part`, modules and plain functions alike; whether there was any."""
        found = False
        for owner, name, child in _callables(part):
            if depth > 1:
                found |= self._wrap_nets(child, depth - 1)
            elif isinstance(child, nn.Module):
                child.forward, found = self._times_tau(child.forward), True
            else:
                owner[name], found = self._times_tau(child), True
        return found

    def _times_tau(self, net):
        def times(answer):
            return type(answer)(map(times, answer)) if isinstance(answer, (tuple, list)) else answer * self.tau
        return lambda *inputs, **named: times(net(*inputs, **named))

    @torch.no_grad()
    def _is_a_path(self, trial, x):
        # Why any exception: the trial calls a stranger's layer in a way that it was not made for, and a no is an answer.
        try:
            z, ldj = self.layer.forward(x)
            self.tau = 1.0
            whole = trial.forward(x)
            self.tau = 0.0
            nothing = trial.forward(x)
            at_ends = _close(whole[0], z) and _close(whole[1], ldj) and _close(nothing[0], x) and _close(nothing[1], 0 * ldj)
            if not at_ends or not hasattr(trial, "inverse"):
                return at_ends
            # A wrong inverse is no news about the path; one that is right at the end must be right on the way.
            if _close(self.layer.inverse(z), x, 1e-2):
                for self.tau in (0.25, 0.5, 0.75):
                    if not _close(trial.inverse(trial.forward(x)[0]), x, 1e-2):
                        return False
            return True
        except Exception:
            return False
        finally:
            self.tau = 1.0

    @torch.no_grad()
    def _look_for_a_matrix(self, x):
        dim = x.shape[-1]
        corners = torch.cat([x.new_zeros(1, dim), torch.eye(dim).to(x)])
        images, _ = self.layer.forward(corners)
        shift, matrix = images[0], (images[1:] - images[0]).T
        if dim != 2 or not _close(self.layer.forward(x)[0], x @ matrix.T + shift):
            return
        if torch.linalg.det(matrix) <= 0:
            self.kind = FLIPPED
            return
        # matrix = rotation @ stretch, the polar decomposition
        U, values, Vt = torch.linalg.svd(matrix)
        turn = U @ Vt
        self.kind, self.matrix = TURNED, (matrix, shift, torch.atan2(turn[1, 0], turn[0, 0]), values, Vt.T)


def _callables(part):
    """(dictionary, key, net) of all that a layer could ask: modules and functions among its attributes, also in lists."""
    for owner in (getattr(part, "_modules", {}), vars(part) if hasattr(part, "__dict__") else {}):
        for name, value in list(owner.items()):
            if isinstance(value, (nn.ModuleList, nn.ModuleDict)):
                yield from ((value._modules, key, child) for key, child in value._modules.items())
            elif isinstance(value, list):
                yield from ((value, i, child) for i, child in enumerate(value) if callable(child))
            elif callable(value) and not name.startswith("_"):
                yield owner, name, value


def _quiet(layer):
    return layer.eval() if isinstance(layer, nn.Module) else layer


def _close(a, b, tolerance=1e-3):
    return bool(a.shape == b.shape and torch.isfinite(a).all() and ((a - b).abs() <= tolerance * (1 + b.abs())).all())


def _rotation(angle):
    c, s = torch.cos(torch.as_tensor(angle)), torch.sin(torch.as_tensor(angle))
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
