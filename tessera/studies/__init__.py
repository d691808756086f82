"""Grids of runs with comparisons and scaling laws, and the search for sampling settings."""
