"""Layers, and the only place where logical axis names stand."""
