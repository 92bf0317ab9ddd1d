"""remit export: annotated shards as the files that other trainers, and the datasets library, read."""
