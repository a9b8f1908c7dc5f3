"""Modules that run in a peer's own Python environment: serve.py is the entry, greedy.py what they share, the
others are one peer each.

Apart from huggingface.py, which runs in flatout's own environment, they import nothing of flatout.
"""
