"""Modules that run in a peer's own Python environment: serve.py is the entry, greedy.py what they share, the
others are one peer each.

Apart from huggingface.py and shipped.py, which run in flatout's own environment, they import nothing of
flatout.
"""
