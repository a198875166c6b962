"""What a distilled training has beyond a plain one, and the trainer that has it."""
