"""Reinforcement mid-training against plain training at equal compute, on tiny models. docs/lab-rmt.md says how."""
