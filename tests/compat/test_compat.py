"""The stand-ins for torch_scatter and torch_sparse, against loops in float64 and the real ones."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from _fairchem_kd_compat import torch_scatter as stand_in
from _fairchem_kd_compat import torch_sparse as sparse_stand_in
from _fairchem_kd_compat.torch_scatter.utils import broadcast

REDUCTIONS = ("sum", "add", "mean", "min", "max", "mul")


def is_real(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and "_fairchem_kd_compat" not in str(spec.origin)


def reduce_by_loop(src, index, dim, size, reduce):
    """A loop over all elements, in float64 (exact for the integers used here)."""
    dim = dim % src.dim()
    index = broadcast_by_loop(index, src, dim)
    shape = list(src.shape)
    shape[dim] = size
    out = torch.full(shape, 1.0 if reduce == "mul" else 0.0, dtype=torch.float64)
    count = torch.zeros(shape)
    for place in itertools.product(*(range(n) for n in src.shape)):
        target = (*place[:dim], int(index[place]), *place[dim + 1 :])
        value, old = src[place].double(), out[target]
        first = count[target] == 0
        if reduce in ("sum", "add", "mean"):
            out[target] = old + value
        elif reduce == "mul":
            out[target] = old * value
        elif reduce == "min":
            out[target] = value if first else min(old, value)
        else:
            out[target] = value if first else max(old, value)
        count[target] += 1
    if reduce == "mean":
        out = out / count.clamp(min=1)
        if not src.is_floating_point():
            out = out.floor()
    return out.to(src.dtype)


def broadcast_by_loop(index, src, dim):
    if index.dim() == src.dim():
        return index.expand(src.shape)
    shape = [1] * src.dim()
    lead = dim if index.dim() == 1 else 0
    for i, n in enumerate(index.shape):
        shape[lead + i] = n
    return index.reshape(shape).expand(src.shape)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def drawn(shape, dtype=torch.float64):
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return torch.randint(-5, 6, shape, generator=generator).to(dtype)

    return drawn


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.int32])
@pytest.mark.parametrize(("shape", "dim"), [((9,), 0), ((9, 3), 0), ((2, 9, 3), 1), ((2, 9), -1)])
def test_scatter_equals_a_loop(reduce, dtype, shape, dim, draw):
    src = draw(shape, dtype)
    index = torch.tensor([3, 0, 3, 1, 1, 0, 3, 5, 3])
    out = stand_in.scatter(src, index, dim=dim, dim_size=7, reduce=reduce)
    assert out.dtype == dtype
    torch.testing.assert_close(out, reduce_by_loop(src, index, dim, 7, reduce))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_scatter_sizes_itself(reduce, draw):
    src = draw((4, 2))
    assert stand_in.scatter(src, torch.tensor([0, 4, 4, 1]), 0, reduce=reduce).shape == (5, 2)
    nothing = stand_in.scatter(src[:0], torch.empty(0, dtype=torch.long), 0, reduce=reduce)
    assert nothing.shape == (0, 2)
    index = torch.empty(0, dtype=torch.long)
    empty = stand_in.scatter(src[:0], index, 0, dim_size=torch.tensor(3), reduce=reduce)
    torch.testing.assert_close(empty, torch.full((3, 2), float(reduce == "mul")).double())


def test_scatter_takes_a_full_index_per_element(draw):
    src, index = (
        draw((5, 3)),
        torch.randint(0, 4, (5, 3), generator=torch.Generator().manual_seed(1)),
    )
    for reduce in REDUCTIONS:
        out = stand_in.scatter(src, index, dim=0, dim_size=4, reduce=reduce)
        torch.testing.assert_close(out, reduce_by_loop(src, index, 0, 4, reduce))


def test_extrema_name_the_first_of_equals_and_pass_nan_on():
    src = torch.tensor([2.0, 7.0, 7.0, 1.0, float("nan"), 3.0], requires_grad=True)
    index = torch.tensor([0, 0, 0, 2, 3, 3])
    out, arg = stand_in.scatter_max(src, index, dim_size=4)
    assert arg.tolist() == [1, 6, 3, 4]
    assert out[:3].tolist() == [7.0, 0.0, 1.0]
    assert out[3].isnan()
    out[0].backward()
    assert src.grad.tolist() == [0, 1, 0, 0, 0, 0]
    assert stand_in.scatter_min(src, index, dim_size=4)[1].tolist() == [0, 6, 3, 4]


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
def test_gradients_and_their_gradients(reduce, draw):
    src = draw((6, 2)).requires_grad_()
    index, indptr = torch.tensor([0, 0, 2, 2, 2, 3]), torch.tensor([0, 2, 2, 5, 6])
    for function in (
        lambda x: stand_in.scatter(x, index, 0, dim_size=5, reduce=reduce) ** 3,
        lambda x: stand_in.segment_coo(x, index, dim_size=5, reduce=reduce) ** 3,
        lambda x: stand_in.segment_csr(x, indptr, reduce=reduce) ** 3,
    ):
        assert gradcheck(function, src)
        assert gradgradcheck(function, src)


def test_gradient_of_a_product(draw):
    src = draw((6, 2)).requires_grad_()
    index = torch.tensor([0, 0, 2, 2, 2, 3])
    assert gradcheck(lambda x: stand_in.scatter(x, index, 0, dim_size=5, reduce="mul"), src)


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_segments_equal_a_loop(reduce, dtype, draw):
    src = draw((7, 2), dtype)
    index = torch.tensor([0, 0, 0, 2, 4, 4, 5])
    expected = reduce_by_loop(src, index, 0, 6, reduce)
    torch.testing.assert_close(stand_in.segment_coo(src, index, reduce=reduce), expected)
    indptr = torch.tensor([0, 3, 3, 4, 4, 6, 7])
    torch.testing.assert_close(stand_in.segment_csr(src, indptr, reduce=reduce), expected)
    # what no range holds is left out
    torch.testing.assert_close(
        stand_in.segment_csr(src, torch.tensor([3, 4, 4, 6]), reduce=reduce),
        reduce_by_loop(src[3:6], index[3:6] - 2, 0, 3, reduce),
    )


def test_segments_of_a_batch(draw):
    src = draw((3, 5, 2))
    index = torch.tensor([[0, 0, 1, 2, 2]])
    expected = reduce_by_loop(src, index[0], 1, 4, "sum")
    torch.testing.assert_close(stand_in.segment_coo(src, index, dim_size=4), expected)
    indptr = torch.tensor([[0, 2, 3, 5, 5]])
    torch.testing.assert_close(stand_in.segment_csr(src, indptr), expected)


def test_counting_with_an_expanded_tensor():
    index = torch.tensor([0, 0, 2, 2, 2])
    ones = index.new_ones(1).expand_as(index)
    counts = stand_in.segment_coo(ones, index, dim_size=4)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [2, 0, 3, 0]


def test_broadcast():
    src, other = torch.arange(3), torch.zeros(2, 3, 4)
    assert broadcast(src, other, 1).shape == other.shape
    assert broadcast(src, other, -2)[1, :, 2].tolist() == [0, 1, 2]
    assert broadcast(src.view(1, 3).expand(2, 3), other, 1)[0, :, 0].tolist() == [0, 1, 2]


def test_what_is_not_offered_says_so():
    src, index = torch.ones(2), torch.tensor([0, 1])
    with pytest.raises(NotImplementedError, match=r"scatter\(out"):
        stand_in.scatter(src, index, out=torch.zeros(2))
    with pytest.raises(ValueError, match="unknown reduce 'std'"):
        stand_in.scatter(src, index, reduce="std")
    matrix = sparse_stand_in.SparseTensor(row=index, col=index, sparse_sizes=(2, 2))
    with pytest.raises(NotImplementedError, match="int64 tensor"):
        matrix[0]
    with pytest.raises(ValueError, match="3 values for 2 entries"):
        matrix.set_value_(torch.ones(3), layout="coo")


def rows_by_loop(row, col, value, wanted):
    """The entries of each wanted row, sorted by column, numbered by their place in ``wanted``."""
    entries = []
    for number, r in enumerate(wanted):
        found = [(c, i) for i, (x, c) in enumerate(zip(row, col, strict=True)) if x == r]
        entries += [(number, c, value[i]) for c, i in sorted(found)]
    return entries


def test_rows_of_a_sparse_tensor_with_duplicates():
    generator = torch.Generator().manual_seed(2)
    row = torch.randint(0, 6, (40,), generator=generator)
    col = torch.randint(0, 4, (40,), generator=generator)  # many entries share a place
    value = torch.arange(40)
    wanted = torch.tensor([5, 0, 0, 3, 2, 5])
    matrix = sparse_stand_in.SparseTensor(row=row, col=col, value=value, sparse_sizes=(6, 4))
    picked = matrix[wanted]
    assert picked.sparse_sizes() == (6, 4)
    expected = rows_by_loop(row.tolist(), col.tolist(), value.tolist(), wanted.tolist())
    storage = picked.storage
    got = zip(storage.row().tolist(), storage.col().tolist(), storage.value().tolist(), strict=True)
    assert list(got) == expected
    counts = picked.set_value(None).sum(dim=1).to(torch.long)
    assert counts.tolist() == [int((row == r).sum()) for r in wanted]
    assert picked.storage.value() is not None  # set_value left it alone
    sums = picked.set_value(torch.ones(len(expected), dtype=torch.long)).sum(dim=1)
    assert sums.tolist() == counts.tolist()
    numbered = picked.set_value_(torch.arange(len(expected)), layout="coo")
    assert numbered is picked
    assert [v.tolist() for v in picked.coo()] == [
        [e[0] for e in expected],
        [e[1] for e in expected],
        list(range(len(expected))),
    ]


def test_sparse_tensor_sizes_itself_and_may_be_empty():
    matrix = sparse_stand_in.SparseTensor(row=torch.tensor([2, 0]), col=torch.tensor([1, 4]))
    assert matrix.sparse_sizes() == (3, 5)
    none = torch.empty(0, dtype=torch.long)
    empty = sparse_stand_in.SparseTensor(row=none, col=none, value=none, sparse_sizes=(3, 3))
    assert empty[torch.tensor([0, 2])].storage.row().numel() == 0
    assert matrix[none].sparse_sizes() == (0, 5)


@pytest.mark.gpu
def test_on_a_gpu(draw):
    src, index = draw((9, 3)), torch.tensor([3, 0, 3, 1, 1, 0, 3, 5, 3])
    for reduce in REDUCTIONS:
        out = stand_in.scatter(src.cuda(), index.cuda(), 0, dim_size=7, reduce=reduce)
        assert out.is_cuda
        torch.testing.assert_close(out.cpu(), reduce_by_loop(src, index, 0, 7, reduce))
    indptr = torch.tensor([0, 3, 3, 9])
    torch.testing.assert_close(
        stand_in.segment_csr(src.cuda(), indptr.cuda()).cpu(), stand_in.segment_csr(src, indptr)
    )
    matrix = sparse_stand_in.SparseTensor(row=index, col=index, value=index)
    on_gpu = sparse_stand_in.SparseTensor(row=index.cuda(), col=index.cuda(), value=index.cuda())
    wanted = torch.tensor([5, 3, 0])
    for a, b in zip(matrix[wanted].coo(), on_gpu[wanted.cuda()].coo(), strict=True):
        assert torch.equal(a, b.cpu())


@pytest.mark.skipif(not is_real("torch_scatter"), reason="no compiled torch_scatter here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_equals_the_compiled_torch_scatter(dtype, draw):
    import torch_scatter

    src = draw((200, 5), dtype)
    index = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(3))
    ordered = index.sort().values
    indptr = torch.bincount(ordered, minlength=40).cumsum(0)
    for reduce in ("sum", "mean", "min", "max"):
        for name, args in {
            "scatter": (src, index, 0, None, 40, reduce),
            "segment_coo": (src, ordered, None, 40, reduce),
            "segment_csr": (src, indptr, None, reduce),
        }.items():
            ours, real = getattr(stand_in, name)(*args), getattr(torch_scatter, name)(*args)
            if reduce == "mean" and name != "scatter" and not src.is_floating_point():
                # its integer means are rounded down by scatter, towards zero by the segments
                args = (src.double(), *args[1:])
                real = getattr(torch_scatter, name)(*args).floor().to(dtype)
            assert ours.dtype == real.dtype, (name, reduce)
            torch.testing.assert_close(ours, real, msg=lambda m, n=name, r=reduce: f"{n} {r}: {m}")
    product = stand_in.scatter(src[:50], index[:50], 0, None, 40, "mul")
    torch.testing.assert_close(
        product, torch_scatter.scatter(src[:50], index[:50], 0, None, 40, "mul")
    )
    for name in ("scatter_max", "scatter_min"):
        ours, real = (getattr(m, name)(src, index, 0)[1] for m in (stand_in, torch_scatter))
        assert torch.equal(ours, real)


def run_python(code: str, *, path: Path | None = None, warnings: str = "error") -> str:
    """Run code in a fresh interpreter, which must say nothing on stderr."""
    if path is not None:
        code = f"import sys; sys.path.insert(0, {str(path)!r})\n" + code
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(is_real("torch_scatter"), reason="a real torch_scatter is installed")
def test_stand_ins_look_like_modules_and_suit_torch_geometric():
    run_python(
        textwrap.dedent(
            """
            import sys
            assert not {"torch", "torch_scatter"} & {*sys.modules}
            import importlib, importlib.util, pickle
            for name in ("torch_scatter", "torch_sparse"):
                spec = importlib.util.find_spec(name)
                assert spec.name == name and spec.submodule_search_locations, spec
                module = importlib.import_module(name)
                assert module.__name__ == module.__spec__.name == name
                assert importlib.util.find_spec(name) is module.__spec__
            import torch, torch_scatter, torch_scatter.utils, torch_sparse
            assert pickle.loads(pickle.dumps(torch_scatter.scatter)) is torch_scatter.scatter
            i = torch.arange(3)
            matrix = torch_sparse.SparseTensor(row=i, col=i, value=i)
            assert pickle.loads(pickle.dumps(matrix)).storage.value().tolist() == [0, 1, 2]

            import torch_geometric.typing
            assert torch_geometric.typing.WITH_TORCH_SCATTER
            assert not torch_geometric.typing.WITH_TORCH_SPARSE
            from torch_geometric.utils import scatter, segment, softmax
            from torch_geometric.utils._scatter import scatter_argmax
            x, index = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0, 0, 1])
            ptr = torch.tensor([0, 2, 3])
            for reduce in ("sum", "mean", "min", "max"):
                assert torch.equal(segment(x, ptr, reduce), scatter(x, index, reduce=reduce))
            assert torch.allclose(softmax(x, ptr=ptr), softmax(x, index))
            assert scatter_argmax(x, index).tolist() == [1, 2]
            """
        ),
        warnings="ignore",  # torch_geometric scripts classes, which torch deprecates
    )


def test_a_real_one_wins_wherever_it_comes_from(tmp_path):
    for name in ("torch_scatter", "torch_sparse"):
        (tmp_path / f"{name}.py").write_text("__version__ = 'real'\n")
    code = "import torch_scatter, torch_sparse; print(torch_scatter.__version__)"
    assert run_python(code, path=tmp_path) == "real\n"
    # known only to a finder that was appended later, as those of editable installs are
    code = textwrap.dedent(
        f"""
        import sys
        from importlib.machinery import PathFinder
        class Late:
            @staticmethod
            def find_spec(name, path=None, target=None):
                return PathFinder.find_spec(name, [{str(tmp_path)!r}])
        sys.meta_path.append(Late)
        import torch_scatter, torch_sparse
        print(torch_scatter.__version__, torch_sparse.__version__)
        """
    )
    if not is_real("torch_scatter"):
        assert run_python(code) == "real real\n"


def test_half_an_uninstall_breaks_nothing(tmp_path):
    import _fairchem_kd_compat.finder as finder

    source = Path(finder.__file__).parent
    hook = next(Path(p) for p in source.parents if (p / "fairchem_kd_compat.pth").is_file())
    site = tmp_path / "site"
    site.mkdir()
    (site / "hook.pth").write_text((hook / "fairchem_kd_compat.pth").read_text())
    # the .pth file without the package
    code = "import site, sys; site.addsitedir(sys.argv[1]); print(len(sys.meta_path))"
    command = [sys.executable, "-E", "-S", "-W", "error", "-c", code, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    # the finder without the stand-ins
    package = site / "_fairchem_kd_compat"
    package.mkdir()
    for name in ("__init__.py", "finder.py"):
        (package / name).write_text((source / name).read_text())
    code += "\ntry: import torch_scatter\nexcept ModuleNotFoundError as e: print(e)"
    command[6] = code
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "No module named 'torch_scatter'" in done.stdout
