"""The stand-in's prompts."""

TokensPrompt = TextPrompt = dict
