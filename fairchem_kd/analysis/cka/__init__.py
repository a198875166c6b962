"""How similar the layers of two models are."""
