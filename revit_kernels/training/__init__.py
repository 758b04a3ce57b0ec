"""Training a ReViT, the labels taken from it, and the assigner that learns them."""
