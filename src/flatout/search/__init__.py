"""The search: candidates, trials kept on disk, and the loop that predicts, builds, measures and proves."""
