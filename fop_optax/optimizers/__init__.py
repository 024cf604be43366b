"""One file a method: its state, `scale_by_x` (the mathematics) and `x` (with rate and momentum)."""
