"""Models of public collections, as they stand there: which of their parameters `capture` finds."""
