"""scores -> kept rows: exact, and almost nothing is read.

eligible.py    which pairs may be selected at all
duplicates.py  the same pair, or its opposite, in several places of the corpus
compose.py     a compound rule as derived scores and leaves; fuse.py makes the scores, dedupe.py one pair per prompt
ranks.py       exact ranks of all rows, for scores that ranks decide
thresholds.py  which rows of a score a leaf keeps, decided by `numbers.order`
evaluate.py    a plan applied to shards: thresholds, then masks
writer.py      kept rows, written: selections and dataset files
table.py       all of it over one Arrow table, in one process
"""

from prefsel.select.table import flipped_rows, select_table

__all__ = ["flipped_rows", "select_table"]
