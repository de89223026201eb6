"""Experts in and out: the public code's checkpoints, pairs of checkpoints, ordinary Hugging Face checkpoints."""
