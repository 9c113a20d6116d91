"""Pairs with their numbers: joined by identifier, read shard by shard, exported as rows."""
