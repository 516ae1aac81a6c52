"""Attention over mixed-precision pages as an SGLang backend."""
