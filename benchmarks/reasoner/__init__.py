"""A tiny model that reasons in long, checkable chains: its task, training and evaluation."""
