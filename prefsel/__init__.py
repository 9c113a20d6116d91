"""Choose the preference data worth training on: score, select exactly, train on what was kept."""

__version__ = "0.1.0"
