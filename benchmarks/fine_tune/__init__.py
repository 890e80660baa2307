"""A trained network fine-tuned unchanged, and converted: ``python -m benchmarks.fine_tune``."""
