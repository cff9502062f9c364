"""What a run leaves for its reader: a table for the terminal and one page."""

from vlp_jax.report import maps
from vlp_jax.report import page
from vlp_jax.report import pictures
from vlp_jax.report import results
from vlp_jax.report import tables

WordMaps = maps.WordMaps
merge = results.merge
word_maps = maps.word_maps
reader = pictures.reader
table = tables.table
write = page.write
