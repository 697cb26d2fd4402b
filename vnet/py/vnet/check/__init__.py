"""Attack a node from inside slices, and say what held: ``vnet check``."""
