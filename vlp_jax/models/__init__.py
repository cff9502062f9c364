"""Architectures: encoders, fusion stacks and the model that joins them. No losses."""
