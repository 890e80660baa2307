"""Other people's networks, converted: ``python -m tests.zoo``."""
