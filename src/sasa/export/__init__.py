"""Networks for where PyTorch's modules can't go: ONNX, exported programs, compiled packages; and batch norm folded.

Importing this tells PyTorch's exporter to ONNX, if its packages are installed, what sasa's operators are.
"""

from .._extras import check_installed
from .folding import fold_batch_norms
from .onnx import onnx_translations, to_onnx
from .program import to_aoti, to_program

__all__ = ["fold_batch_norms", "onnx_translations", "to_aoti", "to_onnx", "to_program"]

try:
    check_installed(("onnx", "onnxscript"), "export")
except ImportError:
    pass  # programs and packages need neither
else:
    onnx_translations()
