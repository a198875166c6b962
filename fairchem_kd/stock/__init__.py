"""What mends or adapts fairchem-core, with the reason for each."""
