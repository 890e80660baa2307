"""Modules built on the operation. Knows nothing of networks."""

from .relative_self_attention import RelativeSelfAttention

__all__ = ["RelativeSelfAttention"]
