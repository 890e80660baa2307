"""Modules built on the operation. Knows nothing of networks."""

from .conversion_plan import ConversionReport
from .convert import conversion_report, convert
from .relative_self_attention import RelativeSelfAttention
from .stem import AttentionStem

__all__ = ["AttentionStem", "ConversionReport", "RelativeSelfAttention", "conversion_report", "convert"]
