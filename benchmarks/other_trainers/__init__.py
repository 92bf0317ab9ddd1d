"""The same steps in torchtitan, in OLMo-core and here: python -m benchmarks.other_trainers, which make other-trainers runs."""
