"""The train step and what surrounds it; generic over models, without tensorflow."""
