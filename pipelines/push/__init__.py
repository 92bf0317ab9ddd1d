"""Annotated shards and trained models as repositories of the Hugging Face hub, with a card of where they come from."""
