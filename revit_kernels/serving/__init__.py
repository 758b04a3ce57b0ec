"""Serving: images in, records out, batched by a budget of tokens."""

from revit_kernels.serving.captured import Answers, CapturedViT

__all__ = ["Answers", "CapturedViT"]
