"""Answers of a policy → what they are worth, and how surely: pure functions of numbers and texts, no Ray.

answers, judges ─▶ winrate (raw, length_controlled)  ┐
log-probs of own samples ─▶ kl                       ├─▶ intervals, bootstrap ─▶ table: one `Evaluation` per model
texts ─▶ diversity      held-out pairs ─▶ preference ┘
"""
