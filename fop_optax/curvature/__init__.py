"""Statistics to running factors to damped inverses to products. Knows arrays, never jaxprs."""
