"""What a store holds, in words, and whether all of it is whole."""

from __future__ import annotations

import json
from pathlib import Path

from fairchem_kd.store import STRUCTURE, Card, Reader
from fairchem_kd.store.failures import FAILED, failures
from fairchem_kd.teachers.place import size_of
from fairchem_kd.text import on_one_line


def contents(folder: Path) -> str:
    """Whose answers a store keeps, of how many structures, and which: several lines."""
    card, reader = Card.read(folder), Reader(folder)
    assert card is not None
    keys: dict[str, set[bytes]] = {}
    columns, own = {}, {column.name for column in STRUCTURE}
    for shard in reader.shards:
        found = {entry.tobytes() for entry in shard.entries["key"]}
        for column in shard.columns:
            if column.name not in own:
                columns[column.name] = column
                keys.setdefault(column.name, set()).update(found)
    structures = set().union(*keys.values())
    lines = [
        f"{folder}: {len(structures)} structures in {len(reader.shards)} shards, "
        f"{size_of(folder) / 1e6:.1f} MB",
        f"  teacher {card.name} ({card.teacher[:16]}){_computed(card)}",
    ]
    failed = failures(folder).keys() - structures
    if failed:
        lines.append(f"  {len(failed)} structures of which it could say nothing: {folder / FAILED}")
    for name, column in sorted(columns.items()):
        rows = {"atom": "N", "edge": "E"}.get(column.per, "")
        shape = ", ".join([*([rows] if rows else []), *map(str, column.shape)])
        dependence = card.dependence.get(name)
        told = "" if dependence is None else f", {dependence:.1e} by what shares the batch"
        lines.append(f"  {name:<28} ({shape}) {column.dtype}: {len(keys[name])} structures{told}")
    if reader.strange:
        lines.append(f"  passed over, of another format: {', '.join(reader.strange)}")
    return "\n".join(lines)


def _computed(card: Card) -> str:
    """How a teacher computed, in words."""
    told = card.calculator
    if told is None:
        return f", computed in {card.precision}"
    versions = " ".join(f"{name} {version}" for name, version in told.get("versions", {}).items())
    return f", {json.dumps(told['arguments'])}, {on_one_line(versions)}"


def check_records(folder: Path) -> tuple[int, int]:
    """Read every record: how many are whole, and how many are damaged or cut off."""
    whole = damaged = 0
    for shard in Reader(folder).shards:
        for row in range(len(shard.entries)):
            if shard.record(row) is None:
                damaged += 1
            else:
                whole += 1
        shard.close()
    return whole, damaged
