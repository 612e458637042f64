"""Nets that give layers their parameters. They may be any function: a flow never inverts its nets."""
from itertools import pairwise

from torch import nn


class MLP(nn.Sequential):
    """A fully connected net (..., d_in) -> (..., d_out) with `activation` after each hidden layer.

    The default is bounded, so far from the data the parameters level off instead of growing without end.
    `zero_last` starts the last layer at zero, so that a coupling starts as the identity (Glow, section 3.3).
    """

    def __init__(self, d_in, d_out, hidden=(64, 64), activation=nn.Tanh, zero_last=False):
        layers = []
        for a, b in pairwise((d_in, *hidden)):
            layers += [nn.Linear(a, b), activation()]
        last = nn.Linear((d_in, *hidden)[-1], d_out)
        if zero_last:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
