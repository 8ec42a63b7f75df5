"""Training: one loop, two workshops (the tokenizer's and the transformer's)."""
