"""What a ReViT and its policies are worth: measurements, comparisons, reports, plots."""
