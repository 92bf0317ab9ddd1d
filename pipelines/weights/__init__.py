"""What an epsilon does to a scored corpus (remit weights)."""
