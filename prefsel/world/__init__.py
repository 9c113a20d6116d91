"""A generated corpus with a gold reward: demo, tests and evidence."""
