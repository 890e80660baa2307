"""Whether PyTorch exports a call to ONNX, and how the call is then to be written."""

from __future__ import annotations

import sys

import torch

_translated = False


def translations_are_registered() -> None:
    """From now on the exporter to ONNX knows the operators: :mod:`sasa.export` has told it."""
    global _translated
    _translated = True


def to_onnx_by_equation() -> bool:
    """Whether a call is exported to ONNX by someone who hasn't imported :mod:`sasa.export`.

    The exporter then doesn't know the operators, but it knows what the equation is made of.
    """
    if _translated or not torch.compiler.is_exporting() or "torch.onnx" not in sys.modules:
        return False
    return torch.onnx.is_in_onnx_export()
