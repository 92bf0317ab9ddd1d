"""Pack a corpus into rows and fill in a reference's log-probs: Ray and vLLM live here."""
