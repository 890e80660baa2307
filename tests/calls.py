"""Calls of every function and module as text, and arguments that are wrong for them, as text too."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import sasa

NAMES = {"torch": torch, "np": np, "nn": nn, **{name: getattr(sasa, name) for name in sasa.__all__}}
SETUP = """
q = torch.linspace(-1, 1, 36).sin().view(1, 2, 3, 2, 3)
x = torch.linspace(-1, 1, 48).cos().view(2, 4, 2, 3)
network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, padding=1))
"""
exec(SETUP, NAMES)

# Calls that are right, as text; a test changes some of the arguments.
ENTRIES = {
    "local_attention": {"query": "q", "key": "q", "value": "q", "kernel_size": "3", "stride": "1", "dilation": "1",
                        "border": "'zero'", "scale": "1.0", "implementation": "None"},
    "local_attention_weights": {"query": "q", "key": "q", "kernel_size": "3", "stride": "1", "dilation": "1",
                                "border": "'zero'", "scale": "1.0", "implementation": "None"},
    "RelativeSelfAttention": {"in_channels": "4", "out_channels": "8", "kernel_size": "3", "num_heads": "2",
                              "stride": "1", "dilation": "1", "border": "'zero'", "position": "'relative'",
                              "position_split": "'per_head'", "scale": "1.0", "pool": "1", "implementation": "None",
                              "recompute": "None"},
    "AttentionStem": {"in_channels": "4", "out_channels": "8", "num_heads": "2", "block_size": "2", "mixtures": "2",
                      "implementation": "None"},
    "convert": {"model": "network", "kernel_size": "3", "num_heads": "2", "stride_mode": "'pool'",
                "border": "'zero'", "position": "'relative'", "position_split": "'per_head'", "scale": "1.0",
                "implementation": "None", "recompute": "None"},
}  # fmt: skip
ENTRIES["conversion_report"] = ENTRIES["convert"]
INTS = {"in_channels", "out_channels", "num_heads", "mixtures", "block_size", "pool"}
PAIRS = {"kernel_size", "stride", "dilation"}
CHOICES = {"border", "position", "position_split", "stride_mode", "implementation"}
EVERY = [(entry, name) for entry, arguments in ENTRIES.items() for name in arguments]


def call_of(entry: str, **changes: str) -> str:
    """The text of a call, and of the call of the module that it makes."""
    arguments = ", ".join(f"{name}={text}" for name, text in (ENTRIES[entry] | changes).items())
    after = {"conversion_report": ".converted"}.get(entry, "" if entry.startswith("local") else "(x)")
    return f"{entry}({arguments}){after}"


def evaluate(text: str) -> object:
    return eval(text, dict(NAMES))


NO_NUMBER = ["None", "'3'", "b'3'", "''", "2.0", "float('nan')", "True", "False", "[]", "{}", "object()", "3j", "int"]
ARRAYS = ["np.array(3)", "np.array([3, 3])", "np.bool_(True)", "np.float32(3)", "np.array('3')"]
TENSORS = ["torch.tensor(3)", "torch.tensor([3, 3])", "torch.tensor(True)", "torch.zeros(0)", "torch.Size([])"]
PAIRS_OF_OTHERS = [
    "[True, 3]",
    "(3, None)",
    "(3, '3')",
    "(3, 2.5)",
    "(3,)",
    "(3, 3, 3)",
    "{3: 3}",
    "{3}",
    "range(2)",
    "((3, 3), 3)",
]
NO_CHOICE = [
    "0",
    "1.0",
    "True",
    "b'zero'",
    "''",
    "'ZERO'",
    "[]",
    "['zero']",
    "('zero', 'mask')",
    "{}",
    "{'zero'}",
    "object()",
    "float('nan')",
    "str",
    "np.array(['zero', 'mask'])",
    "np.array('zero')",
    "np.array([None, None])",
    "torch.zeros(2)",
]
NO_RECOMPUTE = [
    "0",
    "1",
    "2.0",
    "''",
    "'auto'",
    "'False'",
    "[]",
    "[True]",
    "{}",
    "object()",
    "np.bool_(True)",
    "np.array([True, False])",
    "torch.tensor(True)",
    "torch.zeros(2)",
]
NO_SCALE = [
    "'1'",
    "b'1'",
    "None",
    "True",
    "False",
    "1j",
    "[]",
    "[1.0]",
    "(1.0,)",
    "{}",
    "object()",
    "np.array(1.0)",
    "np.array([1.0, 2.0])",
    "torch.tensor(1.0)",
    "np.bool_(True)",
]


HUGE = [2**16, 2**31 - 1, 2**31, 2**40, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]
