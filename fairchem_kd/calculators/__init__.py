"""Teachers that are ASE calculators: made, asked, checked; numpy and ASE alone.

``fairchem-kd teach --calculator`` uses these modules where fairchem-kd is, and the file that
``fairchem-kd teach --writer`` writes consists of them, for environments where it cannot be.
"""

from __future__ import annotations
