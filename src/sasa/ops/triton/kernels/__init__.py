"""The code that runs on the GPU. Its language is Triton, not Python: types are known only when a kernel is compiled."""
