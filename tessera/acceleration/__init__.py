"""Faster or smaller evaluation of a network that leaves its weights and its saved format unchanged."""
