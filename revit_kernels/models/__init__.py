"""Models on packed tokens."""
