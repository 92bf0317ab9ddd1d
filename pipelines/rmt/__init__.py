"""Reinforcement mid-training: think before chosen tokens, predict all others (arXiv 2509.24375, 2506.08007, 2510.01265)."""

import os

# TRL reports each trainer that is made to the hub unless it is told not to; read when huggingface_hub is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its rollout_func is one, and the only way in for rollouts
