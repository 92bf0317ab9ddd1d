"""Annotated shards in other people's trainers: torchtitan, OLMo-core and Megatron. Each module imports the library it is for."""
