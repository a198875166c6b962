"""What a file about one architecture says: where each of its features can be tapped.

A `Tap` attaches to a stock, unmodified model: a forward hook on a module, or, where a value never
leaves a method, a wrapper around that bound method on that one instance. Nothing is attached until
a capture begins, and everything is detached when it ends.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from fairchem.core.models.base import HydraModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fairchem_kd.entry_points import offered
from fairchem_kd.errors import UserError
from fairchem_kd.features.address import FeatureSpec, Kind
from fairchem_kd.stock.conservative import WHERE
from fairchem_kd.stock.gradient_forces import has_gradient_forces

#: Why a model that averages over atoms offers no energies of atoms.
MEAN_READOUT = "this model averages over atoms, so what its atoms give does not add up to an energy"


def refuse_wrong_forces(model: nn.Module, what: str) -> None:
    """Refuse a PaiNN whose forces are a gradient: fairchem's are not that of its energy.

    fairchem-core 1.10 differentiates the sum of the node features in place of the energy, so that
    such a model is no potential, however well it is trained.

    Raises:
        UserError: it is one.
    """
    backbone: Any = backbone_of(model)
    is_painn = any(cls.__name__.startswith("PaiNN") for cls in type(backbone).__mro__)
    if not is_painn or not getattr(backbone, "regress_forces", False):
        return
    if not getattr(backbone, "direct_forces", True):
        raise UserError(
            f"{what} is a PaiNN with direct_forces: false, whose forces fairchem-core 1.10 takes "
            "from the gradient of the node features and not of the energy: set "
            f"model.regress_forces: false with {WHERE}: true for forces that are the gradient of "
            "the energy, or direct_forces: true for a head of their own."
        )


def needs_autograd(model: nn.Module) -> bool:
    """Whether forces may be a gradient, so that a forward needs gradients inside."""
    backbone: Any = backbone_of(model)
    if has_gradient_forces(backbone):
        return True
    forces = getattr(backbone, "regress_forces", True)
    return bool(forces) and not getattr(backbone, "direct_forces", False)


class Handle(Protocol):
    """What undoes an attachment."""

    def remove(self) -> None: ...


class Graph(NamedTuple):
    """A model's edges, with the conventions of `fairchem_kd.features.address.Feature`."""

    edge_index: Tensor  # (2, E)
    edge_vectors: Tensor  # (E, 3), unit, source to target
    cell_offsets: Tensor  # (E, 3)

    def rows(self) -> Tensor:
        """The edges as whole numbers, ``(E, 5)``: source, target, cell offset."""
        return torch.cat([self.edge_index.T, self.cell_offsets.round().long()], dim=1)


Emit = Callable[[Any], None]


@dataclass(frozen=True)
class Tap:
    """One feature of one model, and how it is read.

    ``attach(emit)`` makes every forward call ``emit(values)``, and returns the handle that ends
    this. ``to_edges`` turns such values of atoms into values of edges.
    """

    spec: FeatureSpec
    attach: Callable[[Emit], Handle]
    to_edges: Callable[[Tensor, Graph], Tensor] | None = None


class Architecture(ABC):
    """The features that one model offers.

    Subclasses fill ``taps`` (by address, in the order in which they are listed to the user),
    ``aliases`` (a vector address that is an edge address summed with unit vectors) and ``absent``
    (features that a user may expect here, and why they are not offered).
    """

    #: fairchem's model class, of which subclasses (backbones, wrappers) are meant too
    model_class: ClassVar[type[nn.Module]]
    #: whether a forward draws random numbers, in eval mode too
    draws_numbers: ClassVar[bool] = False
    #: whether it leaves a part of how it looks at positions out of autograd's graph
    detaches_positions: bool = False

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.backbone: Any = root.backbone if isinstance(root, HydraModel) else root
        self.taps: dict[str, Tap] = {}
        self.aliases: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        #: the output that ``atom_energy`` is of; None where there is none, or several may be meant
        self.energy_name: str | None = None

    @property
    @abstractmethod
    def atom_embedding(self) -> nn.Module:
        """The module that each forward calls once, first, with one entry per atom."""

    @property
    @abstractmethod
    def num_elements(self) -> int:
        """Atomic numbers 1 to this one have a row in the embedding table."""

    def watch_graph(self, emit: Callable[[Graph], None]) -> Handle:
        """Make every forward call ``emit(graph)`` before any edge feature is there."""
        raise NotImplementedError(f"{type(self).__name__} has no edges")

    @property
    def has_graph(self) -> bool:
        """Whether the edges of a forward can be had."""
        return type(self).watch_graph is not Architecture.watch_graph

    def add(
        self,
        address: str,
        kind: Kind,
        channels: int,
        description: str,
        attach: Callable[[Emit], Handle],
        to_edges: Callable[[Tensor, Graph], Tensor] | None = None,
        readout: Tensor | None = None,
    ) -> None:
        """Offer a feature; ``readout`` as in `FeatureSpec`."""
        spec = FeatureSpec(address, kind, channels, description, readout)
        self.taps[address] = Tap(spec, attach, to_edges)

    def heads(self, name: str, output: str) -> dict[str, nn.Module]:
        """The modules called ``name`` by the output that they make; ``output`` without a hydra."""
        root = self.root
        places: dict[str, nn.Module] = {output: root}
        if isinstance(root, HydraModel):
            places = dict(root.output_heads.items())
        found = {key: getattr(place, name, None) for key, place in places.items()}
        modules = {key: module for key, module in found.items() if module is not None}
        if getattr(root, "pass_through_head_outputs", False):
            # by what a head calls its output; the last of a name is the one that is not lost
            named = {key: getattr(places[key], "output_name", output) for key in modules}
            return {named[key]: module for key, module in modules.items()}
        return modules

    def head(self, name: str, output: str) -> nn.Module | None:
        """The module ``name`` of what makes ``output``, or of the only head of a hydra with one."""
        found = self.heads(name, output)
        if output not in found and len(found) == 1:
            return next(iter(found.values()))
        return found.get(output)

    def add_atom_energies(
        self, readouts: Mapping[str, nn.Module], select: Select | None = None
    ) -> None:
        """Offer what atoms give to outputs that are sums over them.

        ``atom_energy`` is that of the output ``energy``, or of the only one there is.

        Args:
            readouts: by output, the module that gives ``(N, 1)``.
            select: what takes them out of its output; None: they are its output.
        """
        if not readouts:
            return
        if "energy" in readouts or len(readouts) == 1:
            self.energy_name = "energy" if "energy" in readouts else next(iter(readouts))
            energies = on_output(readouts[self.energy_name], select)
            self.add("atom_energy", "node", 1, "energies of atoms, normalised", energies)
        else:
            several = ", ".join(f"atom_energy@{name}" for name in readouts)
            self.absent["atom_energy"] = f"several outputs are sums over atoms, so name {several}"
        if list(readouts) == ["energy"]:
            return
        for name, module in readouts.items():
            words = f"what atoms give to {name}, normalised"
            self.add(f"atom_energy@{name}", "node", 1, words, on_output(module, select))

    def specs(self) -> dict[str, FeatureSpec]:
        """Every offered address with its spec, aliases among them."""
        specs = {address: tap.spec for address, tap in self.taps.items()}
        for alias, address in self.aliases.items():
            spec = specs[address]
            specs[alias] = FeatureSpec(
                alias,
                "vector",
                spec.channels,
                f"'{address}' times unit edge vectors, summed onto the target atoms",
                spec.readout,
            )
        return specs


#: The group of entry points under which other packages offer architectures.
ENTRY_POINTS = "fairchem_kd.architectures"
_ARCHITECTURES: list[type[Architecture]] = []


def register_architecture(architecture: type[Architecture]) -> type[Architecture]:
    """Class decorator: offer the features of ``architecture.model_class``."""
    _ARCHITECTURES.append(architecture)
    return architecture


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def backbone_of(model: nn.Module) -> Any:
    """What makes the graph and the features: a hydra's backbone, or the bare model itself."""
    root = unwrap(model)
    return root.backbone if isinstance(root, HydraModel) else root


def _offered() -> list[type[Architecture]]:
    """The architectures of other packages: looked for where no registered one fits.

    Loading may register them too, by their decorator.
    """
    found = []
    for name, architecture in offered(ENTRY_POINTS).items():
        if not (isinstance(architecture, type) and issubclass(architecture, Architecture)):
            logging.warning(
                f"The entry point '{name}' of {ENTRY_POINTS} is no architecture: left out."
            )
        else:
            found.append(architecture)
    return found


def architecture_of(model: nn.Module) -> Architecture:
    """The features that ``model`` (bare, in DDP, or a hydra with a supported backbone) offers.

    Raises:
        UserError: if there is no extractor for this architecture.
    """
    root, backbone = unwrap(model), backbone_of(model)
    for architectures in (lambda: _ARCHITECTURES, _offered):
        for architecture in architectures():
            if isinstance(backbone, architecture.model_class):
                return architecture(root)
    known = ", ".join(sorted({a.model_class.__name__ for a in (*_ARCHITECTURES, *_offered())}))
    raise UserError(
        f"features of {type(backbone).__name__} cannot be extracted; supported architectures: "
        f"{known} (and hydra models with one of them as backbone); a loss on outputs, vanilla, "
        "needs no features"
    )


def energy_name_of(model: nn.Module) -> str | None:
    """The output that a model's ``atom_energy`` is of; None where it has none, or no features."""
    try:
        return architecture_of(model).energy_name
    except UserError:
        return None


def draws_numbers(model: nn.Module) -> bool:
    """Whether a forward in eval mode may draw random numbers; True of models that are not known."""
    try:
        return architecture_of(model).draws_numbers
    except UserError:
        return True


def detaches_positions(model: nn.Module) -> bool:
    """Whether autograd is known to miss a part of the slope of what a model says."""
    try:
        return architecture_of(model).detaches_positions
    except UserError:
        return False


def common_energy(student: str | None, teacher: str | None) -> str | None:
    """The output whose atoms' shares two models are compared by, unless told otherwise.

    Args:
        student, teacher: what :func:`energy_name_of` says of each.

    Returns:
        None where they have different ones.
    """
    names = {student, teacher} - {None}
    if len(names) == 2:
        return None
    return names.pop() if names else "energy"


#: What is taken of a module's output or arguments: an item by its index, or what a function gives.
Select = int | Callable[[Any], Any]


def _selected(whole: Any, select: Select) -> Any:
    return select(whole) if callable(select) else whole[select]


def on_output(module: nn.Module, select: Select | None = None) -> Callable[[Emit], Handle]:
    """Attach to a module's output, to one item of it, or to what ``select(output)`` gives."""

    def attach(emit: Emit) -> Handle:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            emit(output if select is None else _selected(output, select))

        return module.register_forward_hook(hook)

    return attach


def on_input(module: nn.Module, select: Select) -> Callable[[Emit], Handle]:
    """Attach to one positional argument of a module's forward, or to ``select(arguments)``."""

    def attach(emit: Emit) -> Handle:
        def hook(_module: nn.Module, args: Any) -> None:
            emit(_selected(args, select))

        return module.register_forward_pre_hook(hook)

    return attach


class _Wrapped:
    """Undoes `wrap_method`."""

    def __init__(self, instance: Any, name: str, before: Any) -> None:
        self.instance, self.name, self.before = instance, name, before

    def remove(self) -> None:
        if self.before is None:
            del vars(self.instance)[self.name]
        else:
            vars(self.instance)[self.name] = self.before


def wrap_method(instance: Any, name: str, receive: Callable[[Any], None]) -> Handle:
    """Call ``receive`` with whatever ``instance.name(...)`` returns, until the handle is removed.

    Only this instance is touched. Overlapping wraps have to be removed last first.
    """
    handle = _Wrapped(instance, name, vars(instance).get(name))
    method = getattr(instance, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        receive(output)
        return output

    vars(instance)[name] = wrapped
    return handle
