"""The machine: what it has (detect), how fast it is at best (ceilings), what is missing on it (checks)."""
