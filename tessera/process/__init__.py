"""The mathematics of noise: what is mixed in, what a raw output means, and what training minimises."""
