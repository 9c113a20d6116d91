"""scores -> selection: exact, and almost nothing is read.

eligible.py    which pairs may be selected at all
duplicates.py  the same pair, or its opposite, in several places of the corpus
rules.py       what to keep, as checked records, compound ones too
compose.py     a compound rule as derived scores and leaves; fuse.py makes the scores, best.py one pair per prompt
cuts.py        the cut of a leaf, from counts
fences.py      exact order statistics of a shard, which enclose every rank; brackets.py asks once between two of them
radix.py       the search behind it: histograms of 16 bits, refined until the boundary is known
evaluate.py    a plan applied to shards: cuts, then masks
counted.py     rows kept of each shard, from those answers; sweep.py all of it in one process, as bitmaps
derived.py     derived scores as artifacts
parts.py       kept rows, selections and dataset files
table.py       all of it over one Arrow table, in one process
"""

from prefsel.select.table import select_table

__all__ = ["select_table"]
