"""Export of networks to run outside PyTorch modules: ONNX, programs, compiled packages; and batch norm folding."""

from .folding import fold_batch_norms
from .onnx import onnx_translations, to_onnx
from .program import to_aoti, to_program

__all__ = ["fold_batch_norms", "onnx_translations", "to_aoti", "to_onnx", "to_program"]
