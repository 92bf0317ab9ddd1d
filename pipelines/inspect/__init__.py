"""Rows of a folder, in the terminal and as a page."""
