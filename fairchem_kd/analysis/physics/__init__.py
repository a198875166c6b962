"""How models do as potentials."""
