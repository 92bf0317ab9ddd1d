"""Real weights: two published models through the whole command line; `make test-real`."""
