"""A trained network fine-tuned as it is, and converted: ``python -m benchmarks.fine_tune``."""
