"""Progressive mixed-precision KV cache (PM-KVQ, arXiv 2505.18610) for unmodified SGLang."""

__version__ = "0.1.0"
