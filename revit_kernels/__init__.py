"""Vision Transformers on images of different token lengths: one packed batch, no padding."""
