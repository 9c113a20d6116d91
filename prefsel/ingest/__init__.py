"""Raw rows → groups, pairs and quarantine.

locations   paths, globs, URIs → files          formats    one row → an `Example`, by a pure adapter per format
readers     one file → rows, streaming          windows    rows → tables of a shard: ids, merging, counting
mapping     a map of fields → prompt (`prompt`, `surroundings`), numbers (`ratings`), what is better (`verdicts`)
identity    ids of prompts, completions, pairs; digests; which prompts are held out
"""
