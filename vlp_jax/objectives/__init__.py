"""Losses with their heads, one file each; each exports `Objective`."""
