"""Vectorized torch: the product path on the CPU, and correct on any torch device."""
