"""Manifests and scores → one page."""
