"""Ways to sum edge features onto atoms, timed against `fairchem_kd.ops.edge_to_node`.

    python benchmarks/edge_to_node.py        # on a CUDA device where there is one, else on CPU
    OMP_NUM_THREADS=1 python benchmarks/edge_to_node.py --device cpu

Prints a table, and writes it with the device and the versions as NAME.csv, and a plot as NAME.png,
into benchmarks/results/ (--out). The ways take turns, one call each in random order, so that a
machine whose speed changes slows them all; times are medians, and spread is half the range between
the quartiles over the median. ``of copy`` is the least number of bytes that the operation has to
move, over the time, over the bandwidth that copying a large tensor reaches on this device.
``memory`` is the peak of tensors beyond the inputs. ``same bits`` is whether
repeated calls agree exactly.

`docs/edge_to_node.md` explains the ways.
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_kd.ops import edge_order, edge_to_node

OURS = "edge_to_node, shared order"
AUTHORS = "authors: scatter of (E, C) and (E, 3, C)"


class Size(NamedTuple):
    """A batch of a GemNet-OC teacher."""

    edges: int
    atoms: int
    channels: int


SIZES = {
    "cuda": [Size(18_000, 600, 512), Size(80_000, 2_000, 512), Size(400_000, 13_000, 256)],
    "cpu": [Size(2_000, 80, 128), Size(18_000, 600, 512), Size(80_000, 2_000, 512)],
}


class Batch(NamedTuple):
    """The inputs of one comparison, and what each way may prepare once per graph."""

    features: Tensor
    vectors: Tensor
    target: Tensor
    atoms: int
    is_sorted: bool


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    edges: int
    atoms: int
    channels: int
    dtype: str
    edges_sorted: bool
    sums: str  # scalars, or scalars and vectors
    passes: str  # forward, or forward and backward
    way: str
    ms: float
    spread: float
    of_copy: float
    memory_mb: float
    same_bits: bool


Way = Callable[[Tensor], Sequence[Tensor]]  # of the features


def ways_for(batch: Batch, with_vectors: bool) -> dict[str, Way]:
    """Every way to compute the sums of this batch that is there, forward."""
    features, vectors, target, atoms, is_sorted = batch
    edges, channels = features.shape
    order = edge_order(target, atoms, is_sorted=is_sorted)
    perm = torch.arange(edges, device=target.device) if order.perm is None else order.perm
    u = vectors if with_vectors else None
    # the peers have to be given one type
    weights = [None, *vectors.to(features.dtype).unbind(1)] if with_vectors else [None]

    def ours(f: Tensor, plan: bool = True) -> Sequence[Tensor]:
        shared = order if plan else None
        both = edge_to_node(f, target, atoms, edge_vectors=u, order=shared)
        return both if with_vectors else [both]

    def weighted(f: Tensor) -> list[Tensor]:
        return [f if w is None else f * w[:, None] for w in weights]

    def index_add(f: Tensor) -> list[Tensor]:
        zeros = f.new_zeros(atoms, channels)
        return [zeros.index_add(0, target, part) for part in weighted(f)]

    def scatter_add(f: Tensor) -> list[Tensor]:
        zeros, index = f.new_zeros(atoms, channels), target[:, None].expand(-1, channels)
        return [zeros.scatter_add(0, index, part) for part in weighted(f)]

    def authors(f: Tensor) -> list[Tensor]:
        """The published code: torch_scatter's sums, which are these, of a product (E, 3, C)."""
        scalar = f.new_zeros(atoms, channels).scatter_add(0, target[:, None].expand_as(f), f)
        if not with_vectors:
            return [scalar]
        product = vectors[:, :, None].to(f.dtype) * f[:, None]
        index = target[:, None, None].expand_as(product)
        return [scalar, f.new_zeros(atoms, 3, channels).scatter_add(0, index, product)]

    def csr(f: Tensor) -> list[Tensor]:
        values = [
            f.new_ones(edges) if w is None else w.index_select(0, perm).to(f.dtype) for w in weights
        ]
        return [
            torch.sparse_csr_tensor(
                order.offsets, perm, value, (atoms, edges), check_invariants=False
            )
            @ f
            for value in values
        ]

    ways: dict[str, Way] = {
        OURS: ours,
        "edge_to_node, sorting every time": lambda f: ours(f, plan=False),
        "index_add": index_add,
        "scatter_add": scatter_add,
        "torch.sparse CSR product": csr,
    }
    if with_vectors:
        ways[AUTHORS] = authors
    if has_torch_scatter():
        import torch_scatter

        ways["torch_scatter.scatter"] = lambda f: [
            torch_scatter.scatter(part, target, dim=0, dim_size=atoms) for part in weighted(f)
        ]
        ways["torch_scatter.segment_csr of sorted edges"] = lambda f: [
            torch_scatter.segment_csr(part[perm], order.offsets) for part in weighted(f)
        ]
    return ways


def has_torch_scatter() -> bool:
    """The compiled one: the stand-in of this project calls scatter_add, which is there already."""
    try:
        import torch_scatter
    except ImportError:
        return False
    return "_fairchem_kd_compat" not in str(torch_scatter.__file__)


def least_bytes(batch: Batch, with_vectors: bool, backward: bool) -> int:
    """Each input read once and each output written once; backward, the gradients likewise."""
    size = batch.features.element_size()
    features = batch.features.numel() * size
    nodes = batch.atoms * batch.features.shape[1] * (4 if with_vectors else 1) * size
    indices = 8 * batch.target.numel() * (1 if batch.is_sorted else 2)
    once = features + nodes + indices + (batch.vectors.nbytes if with_vectors else 0)
    return once * (2 if backward else 1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, on the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # empties the cache, and keeps the device busy while the calls below are launched
    torch.empty(2**28, device=device).zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a large tensor."""
    source = torch.rand(2**28 if device.type == "cuda" else 2**24, device=device)
    to = torch.empty_like(source)
    times = [time_ms(lambda: to.copy_(source), device) for _ in range(11)][1:]
    return 2 * source.nbytes / (1e-3 * statistics.median(times))


def peak_memory_mb(run: Callable[[], object], device: torch.device) -> float:
    """Beyond what was there before: the inputs, that is."""
    from fairchem_kd.analysis.cost.timing import peak_memory

    return peak_memory(run, device) / 2**20


def step(way: Way, batch: Batch, grads: Sequence[Tensor] | None) -> Callable[[], Sequence[Tensor]]:
    """One call of ``way``, with its backward where there are gradients of its results."""
    if grads is None:
        return lambda: way(batch.features)
    features = batch.features.detach().requires_grad_()

    def run() -> Sequence[Tensor]:
        outputs = way(features)
        shaped = grads if len(outputs) == len(grads) else split(grads)
        return [*outputs, *torch.autograd.grad(outputs, features, shaped)]

    return run


def split(grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients for ways that give each component on its own."""
    return [grads[0], *grads[1].unbind(1)]


def compare(batch: Batch, with_vectors: bool, backward: bool, args: Arguments) -> list[Row]:
    device = batch.features.device
    grads = None
    if backward:
        shape = (batch.atoms, batch.features.shape[1])
        generator = torch.Generator(device).manual_seed(1)
        shapes = [shape, (shape[0], 3, shape[1])] if with_vectors else [shape]
        grads = [
            torch.randn(s, generator=generator, device=device).to(batch.features.dtype)
            for s in shapes
        ]
    steps = {}
    for name, way in ways_for(batch, with_vectors).items():
        try:
            run = step(way, batch, grads)
            run()
        except (RuntimeError, NotImplementedError) as error:
            print(f"  {name}: not here: {str(error).splitlines()[0][:80]}")
            continue
        steps[name] = run
    for run in steps.values():  # warm up, compile
        run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    turns, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(args.repeats):
        shuffle(turns)  # or each would always find the cache as the same other leaves it
        for name in turns:
            times[name].append(time_ms(steps[name], device))
    moved = least_bytes(batch, with_vectors, backward)
    rows = []
    for name, run in steps.items():
        median = statistics.median(times[name])
        low, _, high = statistics.quantiles(times[name], n=4)
        first = [x.clone() for x in run()]
        same = all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, run(), strict=True))
        del first
        rows.append(
            Row(
                *batch.features.shape[:1], batch.atoms, batch.features.shape[1],
                str(batch.features.dtype).removeprefix("torch."), batch.is_sorted,
                "scalars and vectors" if with_vectors else "scalars",
                "forward and backward" if backward else "forward",
                name, median, (high - low) / 2 / median,
                moved / (1e-3 * median) / args.bandwidth, peak_memory_mb(run, device), same,
            )
        )  # fmt: skip
    return rows


@dataclass
class Arguments:
    repeats: int
    bandwidth: float


def print_rows(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(
        f"\n{first.edges} edges onto {first.atoms} atoms, {first.channels} channels, "
        f"{first.dtype}, edges {'sorted' if first.edges_sorted else 'not sorted'}: "
        f"{first.sums}, {first.passes}\n"
    )
    print("| way | ms | spread | of copy | memory, MB | same bits | time over ours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ours = next(row.ms for row in rows if row.way == OURS)
    for row in sorted(rows, key=lambda row: row.ms):
        print(
            f"| {row.way} | {row.ms:.3f} | {row.spread:.0%} | {row.of_copy:.0%} | "
            f"{row.memory_mb:.0f} | "
            f"{'yes' if row.same_bits else 'NO'} | {row.ms / ours:.2f} |"
        )


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time of each way over ours, forward and backward apart, one group of bars per batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row.sums, row.passes) for row in rows})
    ways = [way for way in dict.fromkeys(row.way for row in rows) if way != OURS]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(11, 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (sums, passes) in zip(axes[:, 0], panels, strict=True):
        here = [row for row in rows if (row.sums, row.passes) == (sums, passes)]
        groups = list(dict.fromkeys(batch_of(row) for row in here))
        ours = {batch_of(row): row.ms for row in here if row.way == OURS}
        for i, way in enumerate(ways):
            ratios = {batch_of(row): row.ms / ours[batch_of(row)] for row in here if row.way == way}
            places = [g + (i - len(ways) / 2 + 0.5) * 0.8 / len(ways) for g in range(len(groups))]
            heights = [ratios.get(group, 0) for group in groups]
            axis.bar(places, heights, 0.8 / len(ways), label=way)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_xticks(range(len(groups)), groups, fontsize=7)
        axis.set_title(f"{sums}, {passes}", fontsize=9)
        axis.set_ylabel("time over ours")
    axes[0, 0].legend(fontsize=7, ncols=3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def batch_of(row: Row) -> str:
    sizes = f"{row.edges // 1000}k/{row.atoms}/{row.channels}"
    return f"{sizes}\n{row.dtype}\n{'sorted' if row.edges_sorted else 'not sorted'}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} thread(s)"


def versions() -> str:
    try:
        import triton
    except ImportError:
        return f"torch {torch.__version__}, no Triton"
    return f"torch {torch.__version__}, Triton {triton.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="default: 50 on CUDA, 7 on CPU")
    parser.add_argument(
        "--sizes", nargs="*", help="EDGES/ATOMS/CHANNELS, for example 80000/2000/512"
    )
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the files; default: edge_to_node_DEVICE")
    args = parser.parse_args()
    device = torch.device(args.device)
    sizes = [Size(*map(int, text.split("/"))) for text in args.sizes or []]
    sizes = sizes or SIZES["cuda" if device.type == "cuda" else "cpu"]
    measured = Arguments(
        args.repeats or (50 if device.type == "cuda" else 7), copy_bandwidth(device)
    )
    title = f"{device_name(device)}; {versions()}; copies {measured.bandwidth / 1e9:.0f} GB/s"
    print(title)
    rows: list[Row] = []
    for size in sizes:
        for dtype in args.dtypes:
            for is_sorted in (False, True):
                batch = make_batch(size, getattr(torch, dtype), is_sorted, device)
                for with_vectors in (False, True):
                    for backward in (False, True):
                        done = compare(batch, with_vectors, backward, measured)
                        print_rows(done)
                        rows += done
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.name or f"edge_to_node_{device.type}"
    with open(args.out / f"{name}.csv", "w", newline="") as file:
        file.write(f"# {title}\n")
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plot(rows, title, args.out / f"{name}.png")
    print(f"\nwrote {args.out / name}.csv and .png")


def make_batch(size: Size, dtype: torch.dtype, is_sorted: bool, device: torch.device) -> Batch:
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(size.edges, size.channels, generator=generator, device=device)
    vectors = torch.randn(size.edges, 3, generator=generator, device=device)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    target = torch.randint(size.atoms, (size.edges,), generator=generator, device=device)
    if is_sorted:
        target = target.sort().values
    return Batch(features.to(dtype), vectors, target, size.atoms, is_sorted)


if __name__ == "__main__":
    main()
