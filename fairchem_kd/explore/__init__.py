"""New structures out of given ones: rattled, relaxed, and from a teacher's or a student's dynamics.

``starts`` reads what is given, ``groups`` of them are worked on by one of the modes (``rattling``,
``relaxing``, ``driving``, ``following``), each group's frames are a file, and ``assembling`` makes
a data set of them.
"""

from __future__ import annotations
