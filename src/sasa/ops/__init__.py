"""The operation: equation, geometry, checks, registration and implementations. Knows nothing of modules."""
