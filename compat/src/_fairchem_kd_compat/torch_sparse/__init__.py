"""Pure-PyTorch stand-in for the parts of torch_sparse that fairchem-core uses.

It has no `SparseStorage` on purpose: torch_geometric imports that name to see whether torch_sparse
is there, and would then call compiled operators that are not.
"""

from .tensor import SparseTensor

# The torch_sparse release whose behaviour this follows.
__version__ = "0.6.18+fairchemkd"

__all__ = ["SparseTensor"]
