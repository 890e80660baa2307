"""Stand-alone self-attention for vision: a local attention layer that replaces convolution.

Source: Ramachandran et al., *Stand-Alone Self-Attention in Vision Models*, NeurIPS 2019, arXiv 1906.05909.
"""

import importlib

from ._compat import take_whole
from ._when_imported import when_imported
from .nn.attention_conv import AttentionConv2d
from .nn.conversion_report import ConversionReport
from .nn.convert import conversion_report, convert
from .nn.relative_self_attention import RelativeSelfAttention
from .nn.saved import load_converted, save_converted
from .nn.stem import AttentionStem
from .ops.local_attention import local_attention, local_attention_weights

__version__ = "0.2.0"
__all__ = [
    "AttentionConv2d",
    "AttentionStem",
    "ConversionReport",
    "RelativeSelfAttention",
    "conversion_report",
    "convert",
    "load_converted",
    "local_attention",
    "local_attention_weights",
    "save_converted",
]

# PyTorch's ONNX exporter imports this when it collects its translations; sasa's are then added.
when_imported("onnxscript.function_libs.torch_lib.ops", lambda _: importlib.import_module("sasa.export.operators"))
when_imported(
    "fastai.layers", lambda layers: take_whole(layers, (RelativeSelfAttention, AttentionStem, AttentionConv2d))
)
