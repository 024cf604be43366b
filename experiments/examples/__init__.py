"""Runs to start one's own from: copy a file, put in a network and data. Each stands by itself."""
