"""Ways to sum edge features onto atoms, on CPU: median milliseconds.

    OMP_NUM_THREADS=1 python benchmarks/edge_to_node.py

The first two tables are why ``fairchem_kd.ops.edge_to_node`` uses a CSR product on CPU, the third
is why e2n sums before it projects (a linear projection commutes with the sum over edges).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairchem_kd.ops import edge_to_node

SIZES = ((18_000, 600, 512), (80_000, 2_000, 512))  # edges, atoms, channels


def median_ms(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def candidates(
    features: Tensor, vectors: Tensor, target: Tensor, atoms: int
) -> dict[str, dict[str, Callable[[], object]]]:
    edges, channels = features.shape
    order = target.argsort(stable=True)
    in_order, ordered_features = target[order], features[order]
    offsets = torch.searchsorted(in_order, torch.arange(atoms + 1))
    zeros = features.new_zeros

    def index_add(index: Tensor, values: Tensor) -> Tensor:
        return zeros(atoms, channels).index_add_(0, index, values)

    def csr(values: Tensor) -> Tensor:
        matrix = torch.sparse_csr_tensor(
            offsets, order, values, (atoms, edges), check_invariants=False
        )
        return matrix @ features

    def segments() -> Tensor:
        return torch.segment_reduce(ordered_features, "sum", lengths=offsets.diff(), unsafe=True)

    ones, xyz = features.new_ones(edges), vectors[order].t().contiguous()
    head = nn.Linear(channels, channels)
    return {
        "scalars, forward": {
            "edge_to_node (sorting included)": lambda: edge_to_node(features, target, atoms),
            "edge_to_node, sorted edges": lambda: edge_to_node(ordered_features, in_order, atoms),
            "index_add, unsorted edges": lambda: index_add(target, features),
            "index_add, sorted edges": lambda: index_add(in_order, ordered_features),
            "CSR product, sorted before": lambda: csr(ones),
            "segment_reduce, sorted edges": segments,
        },
        "scalars and vectors, forward": {
            "edge_to_node (sorting included)": lambda: edge_to_node(
                features, target, atoms, edge_vectors=vectors
            ),
            "four index_add": lambda: [
                index_add(target, features * w[:, None]) for w in (ones, *vectors.t())
            ],
            "one index_add of (E, 3, C) and one of (E, C)": lambda: [
                zeros(atoms, 3, channels).index_add_(
                    0, target, vectors[:, :, None] * features[:, None]
                ),
                index_add(target, features),
            ],
            "four CSR products, sorted before": lambda: [csr(w) for w in (ones, *xyz)],
        },
        "projection and sum, forward and backward": {
            "aggregate, then project": lambda: (
                head(edge_to_node(features, target, atoms)).sum().backward()
            ),
            "project, then aggregate": lambda: (
                edge_to_node(head(features), target, atoms).sum().backward()
            ),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tables: dict[str, dict[str, list[float]]] = {}
    for edges, atoms, channels in SIZES:
        vectors = nn.functional.normalize(torch.randn(edges, 3), dim=1)
        target = torch.randint(atoms, (edges,))
        ways = candidates(torch.randn(edges, channels), vectors, target, atoms)
        for title, rows in ways.items():
            for name, run in rows.items():
                row = tables.setdefault(title, {}).setdefault(name, [])
                row.append(median_ms(run, args.repeats))
    heads = [f"{e // 1000}k edges / {n} / {c}" for e, n, c in SIZES]
    print(f"torch {torch.__version__}, {args.threads} thread(s), fp32, milliseconds")
    for title, table in tables.items():
        print(f"\n| {title} | " + " | ".join(heads) + " |\n| ---" + " | ---" * len(heads) + " |")
        for name, times in table.items():
            print(f"| {name} | " + " | ".join(f"{t:.1f}" for t in times) + " |")


if __name__ == "__main__":
    main()
