"""scores -> selection: exact, and almost nothing is read.

rules.py       what to keep: top, band, quota; thresholds from counts, rows kept where they lie
radix.py       the search behind it: histograms of 16 bits, refined until the boundary is known
duplicates.py  the same pair, or its opposite, in several places of the corpus
table.py       all of it over one Arrow table, in one process
"""

from prefsel.select.table import select_table

__all__ = ["select_table"]
