"""How the kernels normalise pixels: a factor and an addend for each channel."""

import torch


def affine(images, channels, mean, std) -> tuple[list[float], list[float]]:
    """What to multiply a pixel of each channel with, and what to add then: (x / 255 - mean) / std of uint8 images."""
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    unit = 255 if images and images[0].dtype == torch.uint8 else 1
    return [1 / (s * unit) for s in std], [-m / s for m, s in zip(mean, std)]
