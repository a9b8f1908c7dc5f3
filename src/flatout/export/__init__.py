"""Models as other programs, or a slow line, want them: each export is read back before it counts."""
