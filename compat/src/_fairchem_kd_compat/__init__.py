"""Stand-ins for torch_scatter and torch_sparse, found only where the real ones are missing.

Nothing is imported here: every interpreter of the environment runs this file at its start.
"""

__version__ = "0.1.0"
