"""The finder that offers the stand-ins under the real modules' names, after everyone else.

Imported at the start of every interpreter, so it imports no more than `sys`, which costs nothing.
"""

import sys

STAND_INS = ("torch_scatter", "torch_sparse")


class StandInFinder:
    """Meta-path finder for the names in `STAND_INS`; a real distribution always wins."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """Return the stand-in's spec for a name that no other finder knows, else None."""
        if fullname not in STAND_INS:
            return None
        # A finder that was appended after this one (an editable install's) may have the real one.
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec

        import os
        from importlib.util import spec_from_file_location

        folder = os.path.join(os.path.dirname(__file__), fullname)
        location = os.path.join(folder, "__init__.py")
        if not os.path.isfile(location):
            return None
        return spec_from_file_location(fullname, location, submodule_search_locations=[folder])


def install():
    """Put the finder at the end of `sys.meta_path`, once."""
    if StandInFinder not in sys.meta_path:
        sys.meta_path.append(StandInFinder)
