"""Raw rows → groups, pairs, quarantine."""
