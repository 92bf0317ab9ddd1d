"""The laboratory: the paper's comparisons on tiny models, from corpora to a table of results."""
