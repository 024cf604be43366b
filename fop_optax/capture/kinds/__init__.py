"""The kinds of layers, a file each: how an equation is a product of a weight, and its moments."""
