"""The page that shows what a search found, and `optimize` with that page."""
