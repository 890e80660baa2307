"""What runs on the GPU. The language is Triton's, not Python's: types are known only when a kernel is compiled."""
