"""Models by name, and our own networks."""
