"""Serving: images in, records out, batched by a budget of tokens."""
