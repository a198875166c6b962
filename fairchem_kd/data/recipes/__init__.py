"""Data sets that are computed here, with real labels."""
