"""Where the examples lie in a loss, and whether it is a mean of a function of each of them."""
