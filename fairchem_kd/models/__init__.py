"""Models out of checkpoints: read, built, frozen, exported."""
