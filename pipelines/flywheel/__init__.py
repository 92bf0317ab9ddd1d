"""Stages that are run once for what they are made of, and remit flywheel: mid-train, post-train, score, mid-train again."""
