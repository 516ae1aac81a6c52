"""What SGLang sees: flags, sizing, pool, allocator, attention, metrics."""
