"""How the log-probs of several columns are distributed over a folder (remit distribution)."""
