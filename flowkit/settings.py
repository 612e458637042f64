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
    """The torch device that trainings run on: the one named by FLOWKIT_DEVICE, else the GPU if there is one, else the CPU.

    In fast mode the CPU unless FLOWKIT_DEVICE says otherwise, so that tests and grading come out the same on every machine.
    """
    import torch
    named = os.environ.get("FLOWKIT_DEVICE")
    return torch.device(named or ("cuda" if torch.cuda.is_available() and not fast() else "cpu"))
