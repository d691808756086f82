"""Edits to a network from outside: what is computed, and how often, while its weights and its file stay as they are."""
