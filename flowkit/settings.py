"""The few things that are global: fast mode, seeds, the device. Everything else is an argument."""
import os
import random


def fast() -> bool:
    """Whether fast mode is on (FLOWKIT_FAST=1), which tests and grading use to shorten every training."""
    return os.environ.get("FLOWKIT_FAST", "") == "1"


def steps(normal: int, short: int) -> int:
    """The number of steps to train for: `short` in fast mode, `normal` otherwise."""
    return short if fast() else normal


def seed(n: int) -> None:
    """Seed torch, numpy and random with the same number."""
    import numpy
    import torch
    random.seed(n)
    numpy.random.seed(n)
    torch.manual_seed(n)


def device():
    """The torch device named by FLOWKIT_DEVICE, the CPU if it is not set."""
    import torch
    return torch.device(os.environ.get("FLOWKIT_DEVICE") or "cpu")
