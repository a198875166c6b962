"""Operations on graphs that several losses and extractors share."""

from __future__ import annotations

from fairchem_kd.ops.edge_to_node import edge_to_node
from fairchem_kd.ops.order import EdgeOrder, edge_order

__all__ = ["EdgeOrder", "edge_order", "edge_to_node"]
