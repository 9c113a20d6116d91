"""Selection → model."""
