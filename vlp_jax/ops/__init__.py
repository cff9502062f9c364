"""Pure functions of arrays: no parameters, no files, no flax modules."""
