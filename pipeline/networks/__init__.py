"""Networks by name, their weights, and a network in its place."""
