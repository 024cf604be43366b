"""Curvature-aware optimizers as ordinary optax transformations, over any loss JAX can trace."""
