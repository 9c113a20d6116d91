"""Models → numbers."""
