"""Tasks of lm-evaluation-harness on checkpoints, kept, compared, beside the paper."""
