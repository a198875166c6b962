"""``python -m fairchem_kd``: the `fairchem` command, whatever script is on the PATH."""

import sys

from fairchem_kd.commands.fairchem import main

if __name__ == "__main__":
    sys.exit(main())
