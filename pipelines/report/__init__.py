"""Training runs as one page."""
