"""The model side of t2: spectral bases, experts, engines, strategies, search and controls."""
