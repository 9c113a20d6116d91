"""Answers of a policy → what they are worth, and how surely: numbers and texts in, numbers out.

judges ─▶ comparison ─▶ winrate, length_control          ┐
own answers ─▶ kl (the only module that runs models)     ├─▶ table: one `Evaluation` per model
texts ─▶ diversity         held-out margins ─▶ preference┘
intervals, bootstrap: how surely        answers, answer_formats: files of AlpacaEval and Arena-Hard
"""
