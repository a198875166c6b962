"""What teachers said, kept on disk by structure; needs numpy alone.

:class:`Writer` appends, :class:`Reader` looks up. Nothing here knows a model: what writes or reads
answers of fairchem's models is in :mod:`fairchem_kd.teachers`.
"""

from __future__ import annotations

from fairchem_kd.store.card import Card
from fairchem_kd.store.format import FORMAT, STRUCTURE, Column, Structure, Writer
from fairchem_kd.store.reader import Reader, Shard

__all__ = ["FORMAT", "STRUCTURE", "Card", "Column", "Reader", "Shard", "Structure", "Writer"]
