"""How many tokens an image gets: policies, budgets, the cascade, and AdaptiveViT."""
