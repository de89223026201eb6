"""What every part of t2 shares: errors, digests, seeds, the expert file, curves, records and settings. No torch."""
