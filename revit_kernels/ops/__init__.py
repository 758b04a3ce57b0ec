"""What is computed: one folder per op, one file per backend."""
