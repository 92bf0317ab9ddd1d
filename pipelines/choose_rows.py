"""Which rows of a shard folder stand for all of them."""

import numpy as np

from shards.manifest import Manifest

MOST_PARTS = 64


def choose_rows(manifest: Manifest, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of the rows at random, ascending, int64; 0, or at least as many as there are: all of them.

    Of a large folder the rows of 64 random parts are drawn from, or of as many as it takes: every part that is touched
    is read and hashed whole.
    """
    everything = np.arange(manifest.rows)
    if wanted == 0 or wanted >= manifest.rows:
        return everything
    rng = np.random.default_rng(seed)
    num_parts = max(MOST_PARTS, -(-2 * wanted // manifest.rows_per_part))
    if num_parts < len(manifest.parts):
        parts = rng.choice(len(manifest.parts), num_parts, replace=False)
        everything = everything[np.isin(everything // manifest.rows_per_part, parts)]
    return np.sort(rng.choice(everything, min(wanted, len(everything)), replace=False, shuffle=False))
