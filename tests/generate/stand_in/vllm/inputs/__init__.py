"""Where the stand-in's prompts lie."""
