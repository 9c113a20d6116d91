"""Ray, and only here: a file per stage, the passes over shards, the actors. What is computed lies in other rooms."""
