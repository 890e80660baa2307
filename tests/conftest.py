"""What holds for every test: seeds, threads, NaN in uninitialised memory; and the implementations under test."""

from __future__ import annotations

import os
import random
from typing import NamedTuple

import pytest
import torch

from sasa.ops import cpu, implementations

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for on CUDA
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the GPU kernels on CPU tensors, before anything imports Triton
torch.backends.cudnn.allow_tf32 = False  # by default cuDNN rounds the inputs of convolutions to 10 bits
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_start():
    """The same random numbers for a test whatever ran before it, and NaN wherever it reads what it did not write."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    for name, kept in vars(torch.nn.modules.module).items():
        if name.startswith("_global_") and isinstance(kept, dict):
            kept.clear()  # PyTorch leaves notes of global hooks that were removed
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


class Tested(NamedTuple):
    """An implementation on a device of this machine; of the compiled kernels, one instruction set."""

    name: str
    device: str
    capability: str | None = None

    def __str__(self) -> str:
        return f"{self.name}{f'[{self.capability}]' if self.capability else ''}-{self.device}"

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether it computes tensors of this dtype on this device."""
        try:
            implementations.choose(self.name, torch.empty(1, 1, 1, 1, 1, dtype=dtype, device=self.device))
        except ValueError:
            return False
        return True

    @property
    def has_operator(self) -> bool:
        """Whether it is called through an operator; not so the equation, which PyTorch differentiates and traces."""
        return not implementations.is_the_equation(self.name)

    @property
    def rounds(self) -> bool:
        """Whether it rounds weights to half precision before they are multiplied: see ``oracles.assert_right``."""
        return self.name == "triton"

    @property
    def precise(self) -> torch.dtype:
        """The most precise dtype it supports."""
        return torch.float64 if self.supports(torch.float64) else torch.float32


def pytest_addoption(parser) -> None:
    """``--sample 1``, as ``make check`` has it: every test, but one of its cases."""
    parser.addoption("--sample", type=int, default=0, help="cases of each test that are not nightly; 0: as marked")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Leave the cases that are not in a test's sample, the same in every process, to the nightly run."""
    most = config.getoption("--sample")
    cases: dict[tuple, list] = {}
    for item in items:
        cases.setdefault((item.path, item.cls, getattr(item, "originalname", item.name)), []).append(item)
    for (*_, name), found in cases.items():
        mark = found[0].get_closest_marker("sampled")
        count = most or (mark.args[0] if mark else len(found))
        kept = random.Random(name).sample(found, min(count, len(found)))
        for item in found:
            if item not in kept:
                item.add_marker(pytest.mark.nightly)


FASTEST_ALONE = ("test_compile", "test_operators")  # what they test does not depend on the instruction set


def pytest_generate_tests(metafunc) -> None:
    """Tests that ask for the implementation run with every one of this machine, whatever the number of them."""
    if "implementation" not in metafunc.fixturenames:
        return
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    every = [Tested(name, device) for name in implementations.names() for device in devices]
    if "SASA_TEST_INTERPRETER" not in os.environ:
        every.remove(Tested("triton", "cpu"))  # slow: Triton's interpreter takes the reduced grid of test_triton.py
    tested = [one for one in every if one.supports(torch.float32)]
    if metafunc.module.__name__ not in FASTEST_ALONE:
        tested += [Tested("cpu", "cpu", capability) for capability in cpu.capabilities()[:-1]]
    metafunc.parametrize("implementation", tested, ids=str, indirect=True, scope="session")


@pytest.fixture(scope="session")
def implementation(request) -> Tested:
    """Every implementation this machine can run, the slow ones and those of the future alike."""
    return request.param


@pytest.fixture(autouse=True)
def _instruction_set(request):
    """The instruction set of the implementation under test, for this test alone."""
    tested = request.getfixturevalue("implementation") if "implementation" in request.fixturenames else None
    if tested is None or tested.capability is None:
        yield
        return
    before = cpu.capability()
    cpu.set_capability(tested.capability)
    yield
    cpu.set_capability(before)
