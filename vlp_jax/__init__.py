"""Vision-language pretraining in JAX and Flax."""
