"""What a run would take on hardware that is not here: memory, work, traffic, time."""
