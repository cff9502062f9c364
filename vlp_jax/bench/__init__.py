"""Benchmarks: how fast a step, the input, the contrast and a start are."""
