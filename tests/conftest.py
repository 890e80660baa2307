"""What holds for every test: seeds, threads, NaN in uninitialised memory; and the implementations under test."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from sasa.ops import implementations

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for on CUDA
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_start():
    """The same random numbers for a test whatever ran before it, and NaN wherever it reads what it did not write."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


class Tested(NamedTuple):
    """An implementation on a device of this machine."""

    name: str
    device: str

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether it computes tensors of this dtype on this device."""
        try:
            implementations.choose(self.name, torch.empty(1, 1, 1, 1, 1, dtype=dtype, device=self.device))
        except ValueError:
            return False
        return True

    @property
    def precise(self) -> torch.dtype:
        """The most precise dtype it supports."""
        return torch.float64 if self.supports(torch.float64) else torch.float32


def _tested() -> list[Tested]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    every = [Tested(name, device) for name in implementations.names() for device in devices]
    return [tested for tested in every if tested.supports(torch.float32)]


@pytest.fixture(scope="session", params=_tested(), ids="-".join)
def implementation(request) -> Tested:
    """Every implementation this machine can run, the slow ones and those of the future alike."""
    return request.param
