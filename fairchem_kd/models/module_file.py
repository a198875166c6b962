"""What stands in a student's module file beside its network: the same for writing and reading it.

A ``.pt2`` file of ``torch.export`` may carry files of text. Ours has one, JSON, under `ABOUT`:

- ``format``: `FORMAT`;
- ``model``: the stock model's name;
- ``graph``: ``cutoff`` (Å) and ``max_neighbors``, the nearest of which are kept; ``both_ways``:
  whether of each pair the edge from the atom that comes first is kept, and its way back made;
- ``outputs``: what the network gives: ``atom_energies`` and, of direct ones, ``forces``;
- ``energy``: ``scale`` and ``shift`` (eV) of a structure's sum, ``references`` (eV) by atomic
  number;
- ``forces``: ``from`` ``head`` or ``energy``, ``scale`` and ``shift`` (eV/Å); null without any;
- ``elements``: atomic numbers that it was trained on, null where that is not known;
- ``numbers``: the largest atomic number that it has an embedding of;
- ``torch``: the version that wrote it.
"""

from __future__ import annotations

FORMAT = 1
ABOUT = "fairchem_kd.json"  #: the file's name inside the archive
SUFFIX = ".pt2"
