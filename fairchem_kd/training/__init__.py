"""A training that goes on after any kill with the same bits; it knows no teacher."""
