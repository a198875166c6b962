"""Operations on graphs that several losses and extractors share."""

from __future__ import annotations

from fairchem_kd.ops.edge_to_node import edge_to_node

__all__ = ["edge_to_node"]
