"""Many runs, or many ways to draw from one: what is learned by comparing them."""
