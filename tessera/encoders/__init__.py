"""Networks of others that see or read."""
