"""Zeroth-order fine-tuning: weights tuned by forward passes alone, at the memory of inference."""
