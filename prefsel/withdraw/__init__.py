"""Rows that are taken back leave a workspace: what they are, what holds them, and how each of these goes on without.

keys ─▶ found: ids and hashes, and where they lie ─▶ record ─▶ removal ─▶ record, done
"""
