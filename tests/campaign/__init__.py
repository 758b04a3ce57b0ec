"""Seeded attacks on what decodes, loads and computes. A kind is a module with `attempt(seed)`, which returns in a word
what became of the case, and raises where the library did what it must not."""

KINDS = ("images", "checkpoints", "files", "ops", "interpreted", "videos", "threads", "kills")
