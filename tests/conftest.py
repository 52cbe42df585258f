"""What every test file shares: one thread, reproducible Hypothesis runs, and the folder with real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import torchvision_ops  # noqa: F401 - before any test imports torchvision

# One thread makes sums come out in one order, so that "bit for bit" can be tested; xdist uses the other cores.
torch.set_num_threads(1)

# Deadlines measure the machine, not the code.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that ``UNBACKDOOR_DATA`` names: mnist.npz, cifar10.npz and others."""
    given = os.environ.get("UNBACKDOOR_DATA")
    if not given:
        pytest.skip("UNBACKDOOR_DATA is not set: it should name the folder that holds mnist.npz, cifar10.npz, ...")
    root = Path(given)
    if not root.is_dir():
        pytest.skip(f"UNBACKDOOR_DATA names {given}, which is no folder")
    return root
