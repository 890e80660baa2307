"""Stand-alone self-attention for vision: a local attention layer that takes the place of convolution."""

from .ops.local_attention import local_attention, local_attention_weights

__all__ = ["local_attention", "local_attention_weights"]
