"""Measures on held-out data, one file each; each exports `Evaluator`."""
