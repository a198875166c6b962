"""A sparse matrix in coordinate form, sorted by row and then by column; duplicates are kept."""

from __future__ import annotations

import torch
from torch import Tensor


class _Storage:
    """The sorted coordinates and values of a `SparseTensor`, each ``(nnz,)``."""

    def __init__(self, row: Tensor, col: Tensor, value: Tensor | None) -> None:
        self._row, self._col, self._value = row, col, value

    def row(self) -> Tensor:
        return self._row

    def col(self) -> Tensor:
        return self._col

    def value(self) -> Tensor | None:
        return self._value


class SparseTensor:
    """A sparse matrix of ``sparse_sizes`` with ``value`` at ``(row, col)``.

    Entries that share a place are kept apart, in the order given (a periodic graph has several
    edges between the same two atoms).
    """

    def __init__(
        self,
        row: Tensor,
        col: Tensor,
        value: Tensor | None = None,
        sparse_sizes: tuple[int, int] | None = None,
        is_sorted: bool = False,
    ) -> None:
        if sparse_sizes is None:
            sizes = [int(i.max()) + 1 if i.numel() else 0 for i in (row, col)]
            sparse_sizes = (sizes[0], sizes[1])
        self._sizes = (int(sparse_sizes[0]), int(sparse_sizes[1]))
        if not is_sorted:
            order = torch.argsort(row * self._sizes[1] + col, stable=True)
            row, col = row[order], col[order]
            value = None if value is None else value[order]
        self.storage = _Storage(row, col, value)

    def sparse_sizes(self) -> tuple[int, int]:
        """Return the numbers of rows and of columns."""
        return self._sizes

    def coo(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return row, column and value of every entry, sorted."""
        return self.storage._row, self.storage._col, self.storage._value

    def set_value_(self, value: Tensor | None, layout: str | None = "coo") -> SparseTensor:
        """Replace the values, given in the order of `coo`, in place."""
        if layout not in (None, "coo", "csr"):
            raise NotImplementedError(
                f"set_value_(layout={layout!r}) is not in fairchem-kd-compat's stand-in; "
                "install torch_sparse for it"
            )
        if value is not None and value.size(0) != self.storage._row.numel():
            raise ValueError(f"{value.size(0)} values for {self.storage._row.numel()} entries")
        self.storage._value = value
        return self

    def set_value(self, value: Tensor | None, layout: str | None = "coo") -> SparseTensor:
        """Return a matrix with the same entries and other values."""
        row, col, _ = self.coo()
        return SparseTensor(row, col, None, self._sizes, is_sorted=True).set_value_(value, layout)

    def sum(self, dim: int) -> Tensor:
        """Return the sums over the columns of each row, ``(rows, ...)``; no value counts as 1."""
        if dim not in (1, -1):
            raise NotImplementedError(
                f"sum(dim={dim}) is not in fairchem-kd-compat's stand-in; install torch_sparse"
            )
        row, _, value = self.coo()
        if value is None:
            value = torch.ones(row.shape, dtype=torch.get_default_dtype(), device=row.device)
        return value.new_zeros(self._sizes[0], *value.shape[1:]).index_add(0, row, value)

    def __getitem__(self, index: Tensor) -> SparseTensor:
        """Return the rows that the 1-d integer tensor ``index`` names, in its order."""
        if not (isinstance(index, Tensor) and index.dim() == 1 and index.dtype == torch.long):
            raise NotImplementedError(
                "only a 1-d int64 tensor indexes fairchem-kd-compat's SparseTensor; "
                "install torch_sparse for other indices"
            )
        row, col, value = self.coo()
        counts = torch.bincount(row, minlength=self._sizes[0])
        starts = counts.cumsum(0) - counts
        new_counts = counts[index]
        new_starts = new_counts.cumsum(0) - new_counts
        numbers = torch.arange(index.numel(), device=index.device)
        new_row = torch.repeat_interleave(numbers, new_counts)
        places = torch.arange(new_row.numel(), device=index.device)
        places = places + (starts[index] - new_starts)[new_row]
        return SparseTensor(
            new_row,
            col[places],
            None if value is None else value[places],
            (index.numel(), self._sizes[1]),
            is_sorted=True,
        )
