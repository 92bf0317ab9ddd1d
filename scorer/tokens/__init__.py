"""Corpora that are token ids already: OLMo-core's .npy, Megatron's .bin with .idx, datatrove's .ds with .ds.index, and
columns of ids in parquet, Arrow and datasets. scorer/tokens/read.py is where to begin."""
