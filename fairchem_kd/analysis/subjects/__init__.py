"""What an analysis is of: runs, checkpoints, splits, structures."""
