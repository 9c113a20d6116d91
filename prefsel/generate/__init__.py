"""Prompts → new completions.

    engine ── prompts once, rows that come and go ──► responses ──► quality: which are of no use, and why
     ├─ cohort, attention   keys and values of prompts and rows
     ├─ plain               transformers' own loop, for models that these would not serve exactly
     ├─ draw                a token by a random number of its own
     └─ settings            end tokens, and what of a model's generation settings is not applied
    shard ── prompts ──► engine ──► answered: groups with the responses of use, the others with a reason
    requests   the same for an engine that serves requests one by one and in any order, as vLLM does

`sample` is the engine for callers that think in words.
"""
