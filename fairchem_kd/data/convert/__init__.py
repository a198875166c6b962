"""Other people's files as fairchem's data sets."""
