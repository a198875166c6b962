"""Pure-PyTorch stand-in for the parts of torch_scatter that fairchem-core uses."""

from .scatter import scatter, scatter_max, scatter_min
from .segment import segment_coo, segment_csr

# The torch_scatter release whose behaviour this follows.
__version__ = "2.1.2+fairchemkd"

__all__ = ["scatter", "scatter_max", "scatter_min", "segment_coo", "segment_csr"]
