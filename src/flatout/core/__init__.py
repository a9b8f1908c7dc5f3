"""Shared types and files. Imports nothing of flatout but `errors`."""
