"""Capture features of a stock model during its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.features.address import (
    GRAPH,
    Feature,
    FeatureSpec,
    Kind,
    Request,
    parse_address,
    summarise_addresses,
)
from fairchem_kd.features.architecture import Architecture, Graph, Tap, architecture_of
from fairchem_kd.ops import EdgeOrder, edge_order, edge_to_node


def available_features(model: nn.Module) -> dict[str, FeatureSpec]:
    """Every single address that ``model`` offers, with its spec, defaults first.

    Raises:
        UserError: if there is no extractor for this architecture.
    """
    return architecture_of(model).specs()


class _Source(NamedTuple):
    """One layer of a request: a tap, and the form in which its values are wanted."""

    tap: str
    form: Kind


class _Enough(Exception):
    """Every feature that is wanted has been captured."""


class Captured:
    """The features of one forward, by request; filled when the capture's context is left."""

    def __init__(self) -> None:
        self._features: dict[Request, Feature] | None = None

    def __getitem__(self, request: Request) -> Feature:
        """The feature of ``request``.

        Raises:
            RuntimeError: inside the capture's context, or after an error in it.
            KeyError: if this was not requested from the extractor.
        """
        if self._features is None:
            raise RuntimeError("captured features are there once the capture's context is left")
        return self._features[Request(*request)]


class FeatureExtractor:
    """Taps a stock model, bare or in DistributedDataParallel, for the requested features.

    ``specs`` says what each request will give, after aggregation and concatenation. The model is
    untouched outside `capture`.

    ``around``, where it is set, gives a context manager inside which each tap takes in its values
    and aggregates them: a stopwatch, say. It counts from the next `capture` on.

    Raises:
        UserError: for an architecture, feature, layer or form that is not offered.
    """

    def __init__(self, model: nn.Module, requests: Iterable[Request]) -> None:
        self.around: Callable[[], AbstractContextManager[Any]] | None = None
        self._sources: dict[Request, list[_Source]] = {}
        self.specs: dict[Request, FeatureSpec] = {}
        self._forms: dict[str, set[Kind]] = {}  # what is wanted of each tap
        self._seen_whole = False  # a forward in which every tap fired once and no more
        wanted = dict.fromkeys(Request(*r) for r in requests)
        self._graph = GRAPH in wanted
        if not wanted:
            return  # of a model of any architecture
        self._architecture = architecture_of(model)
        for request in wanted:
            if request == GRAPH:
                self.specs[GRAPH] = _graph_spec(self._architecture)
                continue
            self._sources[request] = _resolve(self._architecture, request)
            self.specs[request] = self._spec(request)
        for sources in self._sources.values():
            for tap, form in sources:
                self._forms.setdefault(tap, set()).add(form)

    def _spec(self, request: Request) -> FeatureSpec:
        specs = [self._architecture.taps[tap].spec for tap, _ in self._sources[request]]
        description = "; ".join(spec.description for spec in specs)
        if specs[0].kind == "edge" and request.form != "edge":
            description += ", summed onto the target atoms" + (
                " with the edges' unit vectors" if request.form == "vector" else ""
            )
        channels = sum(spec.channels for spec in specs)
        readout = specs[0].readout if len(specs) == 1 else None
        if specs[0].kind == "edge" and request.form != "vector":
            readout = None  # a head that reads edges makes forces of them, with their unit vectors
        return FeatureSpec(request.address, request.form, channels, description, readout)

    @contextmanager
    def capture(self, detach: bool = False, *, stop: bool = False) -> Iterator[Captured]:
        """Capture during the one forward of the model inside this context.

        Edge features wanted as node or vector features are aggregated on the spot, so that their
        (E, C) values are not kept. ``detach`` cuts the features off the autograd graph.

        With ``stop`` the context is left as soon as the last of the features is there, and the
        rest of the forward is not run: nothing after that forward inside the context may be
        counted on. The first such forward of an extractor is run whole, since only that shows
        whether a feature fires more than once.

        Raises:
            RuntimeError: if a requested feature does not fire exactly once, or has another shape
                than promised.
        """
        captured = Captured()
        if not self.specs:
            captured._features = {}
            yield captured
            return
        stop = stop and self._seen_whole
        run = _Run(self._architecture, self._forms, self._graph, detach, self.around, stop)
        with suppress(_Enough), ExitStack() as stack:
            run.attach(stack)
            yield captured
        captured._features = {
            request: run.feature(self.specs[request], sources)
            for request, sources in self._sources.items()
        }
        if self._graph:
            graph = run._the_graph(GRAPH.address)
            captured._features[GRAPH] = Feature(self.specs[GRAPH], graph.rows(), *graph)
        self._seen_whole = True


def _graph_spec(architecture: Architecture) -> FeatureSpec:
    """What :data:`GRAPH` gives.

    Raises:
        UserError: the edges of this architecture cannot be had.
    """
    if not architecture.has_graph:
        raise UserError(
            f"the edges of {type(architecture.backbone).__name__} cannot be had; take the other "
            "model's, or a loss without edges"
        )
    return FeatureSpec(*GRAPH, 5, "the model's edges: source, target, cell offset of the source")


def _resolve(architecture: Architecture, request: Request) -> list[_Source]:
    """The taps behind a request, one per layer."""
    specs = architecture.specs()
    model = type(architecture.backbone).__name__
    sources = []
    for address in parse_address(request.address):
        if address not in specs:
            raise UserError(_not_offered(architecture, specs, request.address, address))
        kind = specs[address].kind
        if request.form != kind and kind != "edge":
            same = summarise_addresses(a for a, s in specs.items() if s.kind == request.form)
            raise UserError(
                f"'{request.address}' of {model} is a {kind} feature and cannot be had as a "
                f"{request.form} feature" + (f"; {request.form} features here: {same}" * bool(same))
            )
        if request.form not in ("node", "vector", "edge"):
            raise UserError(f"form {request.form!r} of '{request.address}': node, vector or edge")
        sources.append(_Source(architecture.aliases.get(address, address), request.form))
    return sources


def _not_offered(
    architecture: Architecture, specs: dict[str, FeatureSpec], address: str, single: str
) -> str:
    model = type(architecture.backbone).__name__
    name, _, layer = single.partition("@")
    within = f" (in '{address}')" if address != single else ""
    names = list(dict.fromkeys(a.partition("@")[0] for a in specs))
    layers = [a for a in specs if a.startswith(f"{name}@")]
    if name in architecture.absent and not (layer and layers):
        reason = f": {architecture.absent[name]}"
    elif layers and layer:
        reason = f": '{name}' has the layers {summarise_addresses(layers)}"
    elif layers:
        reason = f": name a layer, {summarise_addresses(layers)}"
    elif name in specs:
        reason = f": '{name}' has no layers"
    else:
        near = did_you_mean(name, names)
        reason = near if "did you mean" in near else ""
    return (
        f"{model} has no feature '{single}'{within}{reason}; it offers: "
        f"{summarise_addresses(specs)}"
    )


class _Run:
    """The state of one capture: what has fired so far."""

    def __init__(
        self,
        architecture: Architecture,
        forms: dict[str, set[Kind]],
        needs_graph: bool,
        detach: bool,
        around: Callable[[], AbstractContextManager[Any]] | None,
        stop: bool,
    ) -> None:
        self.architecture = architecture
        self.forms = forms
        self.needs_graph = needs_graph
        self.detach = detach
        self.around = around
        self.stop = stop
        self.num_atoms: int | None = None
        self.graph: Graph | None = None
        self.order: EdgeOrder | None = None  # of the graph's edges, for all taps
        self.fired = dict.fromkeys(forms, 0)
        self.values: dict[_Source, Tensor] = {}

    def attach(self, stack: ExitStack) -> None:
        """Attach every tap that is wanted; ``stack`` detaches them, last first."""
        embedding = self.architecture.atom_embedding
        stack.callback(embedding.register_forward_pre_hook(self._count_atoms).remove)
        taps = {name: self.architecture.taps[name] for name in self.forms}
        if self.needs_graph or any(tap.spec.kind == "edge" for tap in taps.values()):
            stack.callback(self.architecture.watch_graph(self._set_graph).remove)
        for name, tap in taps.items():
            stack.callback(self._attach(name, tap))

    def _attach(self, name: str, tap: Tap) -> Any:
        around = self.around or nullcontext

        def receive(values: Any) -> None:
            with around():
                self._receive(name, tap, values)
            self._leave_if_enough()

        return tap.attach(receive).remove

    def _leave_if_enough(self) -> None:
        if self.stop and all(self.fired.values()) and (self.graph or not self.needs_graph):
            raise _Enough

    def _count_atoms(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.num_atoms = args[0].shape[0]

    def _set_graph(self, graph: Graph) -> None:
        if self.detach:
            graph = Graph(*(tensor.detach() for tensor in graph))
        self.graph = graph
        self._leave_if_enough()

    def _receive(self, name: str, tap: Tap, values: Any) -> None:
        self.fired[name] += 1
        if self.fired[name] > 1:  # reported when the context is left
            return
        if self.detach and isinstance(values, Tensor):
            values = values.detach()
        if tap.to_edges is not None:
            values = tap.to_edges(values, self._the_graph(name))
        self._check_shape(name, tap.spec, values)
        forms = self.forms[name]
        if tap.spec.kind != "edge" or "edge" in forms:
            self.values[_Source(name, tap.spec.kind)] = values
        if tap.spec.kind != "edge" or forms == {"edge"}:
            return
        graph, num_atoms = self._the_graph(name), self.num_atoms
        assert num_atoms is not None
        target = graph.edge_index[1]
        if self.order is None:
            self.order = edge_order(target, num_atoms)
        order = self.order
        if "vector" in forms:
            node, vector = edge_to_node(
                values, target, num_atoms, edge_vectors=graph.edge_vectors, order=order
            )
            self.values[_Source(name, "vector")] = vector
        else:
            node = edge_to_node(values, target, num_atoms, order=order)
        if "node" in forms:
            self.values[_Source(name, "node")] = node

    def _the_graph(self, name: str) -> Graph:
        if self.graph is None:
            raise RuntimeError(f"feature '{name}' fired before the model had made its graph")
        return self.graph

    def _check_shape(self, name: str, spec: FeatureSpec, values: Any) -> None:
        expected: list[int | None]
        if spec.kind == "edge":
            expected = [self._the_graph(name).edge_index.shape[1], spec.channels]
        elif spec.kind == "vector":
            expected = [self.num_atoms, 3, spec.channels]
        else:
            expected = [self.num_atoms, spec.channels]
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != expected:
            raise RuntimeError(
                f"feature '{name}' of {type(self.architecture.backbone).__name__} has the shape "
                f"{shape} where {expected}, in words {spec.shape}, was promised"
            )

    def feature(self, spec: FeatureSpec, sources: list[_Source]) -> Feature:
        """Put one request's layers together."""
        for tap, _ in sources:
            if self.fired[tap] != 1:
                times = "never" if self.fired[tap] == 0 else f"{self.fired[tap]} times"
                raise RuntimeError(
                    f"feature '{tap}' of {type(self.architecture.backbone).__name__} fired {times} "
                    "inside one capture; each capture has to hold exactly one forward of the model"
                )
        layers = [self.values[source] for source in sources]
        values = layers[0] if len(layers) == 1 else torch.cat(layers, dim=-1)
        return Feature(
            spec, values, *(self._the_graph(spec.address) if spec.kind == "edge" else ())
        )
