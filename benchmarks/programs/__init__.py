"""Reasoning programs in SGLang's frontend language that fork, join and come back to what is cached.

Each module holds one ``sgl.function`` and runs alone against any server, ours or stock:

* ``self_consistency``: k chains from one prompt, majority vote.
* ``tree_of_thought``: a few lines at a time, several ways; a checker (or the model's own log-probabilities) prunes.
* ``tutor``: question after question in one conversation.
* ``best_of_n``: k candidates from one prompt, ``sgl.select`` takes the likeliest.

``python -m benchmarks.programs`` (``pmkvq bench programs``) runs all of them on servers of its own and compares.
"""
