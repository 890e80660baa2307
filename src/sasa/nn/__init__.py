"""Modules built on the operation. Knows nothing of networks."""

from .attention_conv import AttentionConv2d
from .conversion_report import ConversionReport
from .convert import conversion_report, convert
from .relative_self_attention import RelativeSelfAttention
from .saved import load_converted, save_converted
from .stem import AttentionStem

__all__ = [
    "AttentionConv2d",
    "AttentionStem",
    "ConversionReport",
    "RelativeSelfAttention",
    "conversion_report",
    "convert",
    "load_converted",
    "save_converted",
]
