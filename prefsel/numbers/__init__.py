"""Exact numbers over shards: order statistics, moments, tails. Shards send counts and sums; rows stay."""
