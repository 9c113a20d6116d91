"""A policy makes its own prompts: a strategy asks for a new one, what was answered is read and checked.

strategies → what the policy is asked    rewritten → the prompt in its answer    evolve → new, allowed, short enough
"""
