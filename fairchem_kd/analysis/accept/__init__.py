"""Whether a student is good enough for a use: measured, and held against bars."""
