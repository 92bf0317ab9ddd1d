"""Post-training with TRL: supervised fine-tuning, preferences, reinforcement learning with verifiable rewards."""

import os

# TRL reports each trainer that is made to the hub unless it is told not to; read when huggingface_hub is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
