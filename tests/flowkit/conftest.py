import sys
from pathlib import Path

import pytest
import torch

# So that the tests find layer_laws.py whichever way pytest imports them.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def quiet():
    """One thread and a fixed seed: tests may run beside others, and each must mean the same alone."""
    torch.set_num_threads(1)
    # zuko switches the distributions' own checks off for the whole process.
    torch.distributions.Distribution.set_default_validate_args(True)
    torch.manual_seed(0)
