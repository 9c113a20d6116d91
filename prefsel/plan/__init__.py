"""From a configuration to nodes: what every artifact is called, what it needs, and whether that can work."""
