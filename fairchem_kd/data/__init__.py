"""Real-physics data sets without a download, in the LMDB format that fairchem reads."""
