"""Small models made from the corpus itself, for trials without weights at hand."""
