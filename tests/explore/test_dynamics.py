"""Langevin dynamics of many structures side by side."""

from __future__ import annotations

import numpy as np
import pytest
from ase import units
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.md.verlet import VelocityVerlet
from explorations import Wells, start, wells

from fairchem_kd.explore.driving import teacher_dynamics
from fairchem_kd.explore.dynamics import Walker, drive
from fairchem_kd.explore.guards import APART, CLOSE, NOT_FINITE, STRONG, Guard, Limits
from fairchem_kd.explore.settings import MD, Settings

LOOSE = Limits(min_distance=0.0, max_gap=1e3, max_force=1e6)
ETHANOL, WATER = start(molecule("CH3CH2OH"), fixed=[0, 4]), start(molecule("H2O"))


class Well(Calculator):
    """The same as :class:`Wells`, for ASE."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, wells: Wells) -> None:
        super().__init__()
        self.wells = wells

    def calculate(self, atoms=None, properties=(), system_changes=()) -> None:  # type: ignore[no-untyped-def]
        answer = self.wells.answer(atoms)
        self.results = {"energy": answer.energy, "forces": answer.forces}


def test_without_friction_it_is_velocity_verlet() -> None:
    settings = Settings(mode=MD, steps=30, every=31, friction=0.0, limits=LOOSE)
    walker = Walker(0, WATER, settings)
    atoms = WATER.atoms()
    atoms.calc = Well(wells(WATER))
    atoms.set_velocities(walker.velocity.copy())
    VelocityVerlet(atoms, timestep=0.5 * units.fs).run(30)
    drive([walker], wells(WATER), settings, lambda *_: None, lambda *_: None)
    np.testing.assert_allclose(walker.atoms.positions, atoms.positions, atol=1e-10)
    np.testing.assert_allclose(walker.velocity, atoms.get_velocities(), atol=1e-10)
    assert np.abs(atoms.positions - WATER.pos).max() > 0.01


def test_in_a_well_positions_and_velocities_have_their_temperature() -> None:
    """Equipartition: k<x²> = m<v²> = kT for each coordinate."""
    settings = Settings(mode=MD, steps=4000, every=8, friction=0.1, limits=LOOSE, time_step=1.0,
                        temperature=(400.0, 400.0))  # fmt: skip
    molecules = start(molecule("CH3CH2OH"))
    walker = Walker(0, molecules, settings)
    seen: list[tuple[float, float]] = []
    mass = molecules.atoms().get_masses()[:, None]

    def at_frames(step: int, _: object) -> None:
        if step > 500:
            away = walker.atoms.positions - molecules.pos
            seen.append((5.0 * np.mean(away**2), np.mean(mass * walker.velocity**2)))

    drive([walker], wells(molecules), settings, at_frames, lambda *_: None)
    heat = units.kB * 400
    assert np.mean(seen, axis=0) == pytest.approx([heat, heat], rel=0.15)


def test_the_temperature_goes_from_one_to_the_other() -> None:
    settings = Settings(steps=10, temperature=(100.0, 300.0))
    assert [settings.temperature_at(step) for step in (0, 5, 10)] == [100, 200, 300]


def test_a_structure_takes_the_same_way_whatever_is_beside_it_and_fixed_atoms_rest() -> None:
    settings = Settings(mode=MD, steps=12, every=4, limits=LOOSE, temperature=(500.0, 900.0))
    potential = wells(ETHANOL, WATER)
    together = teacher_dynamics([ETHANOL, WATER], settings, potential)
    assert potential.asked == [2] * 13  # one call a step for both
    alone = teacher_dynamics([WATER], settings, wells(WATER))
    assert [one.start for one in together.found] == [0] * 3 + [1] * 3
    for one, other in zip(together.found[3:], alone.found, strict=True):
        assert (one.pos == other.pos).all()
        assert one.answer.energy == other.answer.energy
        assert (one.answer.forces == wells(WATER)([placed(one.pos)])[0].forces).all()
        assert (one.pos == one.pos.astype("<f4")).all()
    for one in together.found[:3]:
        assert (one.pos[[0, 4]] == ETHANOL.pos[[0, 4]]).all()
        assert (one.pos[[1, 2, 3]] != ETHANOL.pos[[1, 2, 3]]).all()
    other_seed = teacher_dynamics([WATER], Settings(**{**vars(settings), "seed": 1}), wells(WATER))
    assert (other_seed.found[0].pos != alone.found[0].pos).all()
    assert [one.value for one in alone.found] == pytest.approx([633.33, 766.67, 900.0], abs=0.01)


def placed(pos: np.ndarray):  # type: ignore[no-untyped-def]
    atoms = WATER.atoms()
    atoms.positions[:] = pos
    return atoms


def test_dynamics_end_where_a_limit_is_broken_and_what_was_before_is_kept() -> None:
    settings = Settings(mode=MD, steps=40, every=2, friction=0.0,
                        limits=Limits(0.0, 1e3, 3.0))  # fmt: skip
    hot = Settings(**{**vars(settings), "temperature": (4000.0, 4000.0)})
    group = teacher_dynamics([WATER, ETHANOL], hot, wells(WATER, ETHANOL, stiffness=20.0))
    assert group.counts[f"dynamics ended: {STRONG}"] == 2
    assert group.found
    for one in group.found:
        assert np.linalg.norm(one.answer.forces, axis=1).max() <= 3.0


def test_a_potential_that_says_nothing_ends_it() -> None:
    class Silent(Wells):
        def answer(self, atoms):  # type: ignore[no-untyped-def]
            return None if len(atoms) == 3 and len(self.asked) > 5 else super().answer(atoms)

    potential = Silent({3: WATER.pos, 9: ETHANOL.pos})
    settings = Settings(mode=MD, steps=8, every=2, limits=LOOSE)
    group = teacher_dynamics([WATER, ETHANOL], settings, potential)
    assert [one.start for one in group.found] == [0, 0, 1, 1, 1, 1]
    assert group.counts == {"dynamics ended: the potential could say nothing": 1}


def test_limits_are_those_of_what_is_given_where_that_breaks_them() -> None:
    guard = Guard(WATER, Limits(max_gap=5.0, max_force=3.0))
    pos = WATER.pos
    assert guard.broken_by(pos) == ""
    assert guard.broken_by(pos, np.full((3, 3), np.nan)) == NOT_FINITE
    assert guard.broken_by(pos * np.nan) == NOT_FINITE
    assert guard.broken_by(pos, np.array([[3.1, 0, 0], [0, 0, 0], [0, 0, 0]])) == STRONG
    near = pos.copy()
    near[1] = near[0] + 0.4 * (near[1] - near[0])
    assert guard.broken_by(near) == CLOSE
    away = pos + np.array([[0, 0, 0], [0, 0, 0], [6.0, 0, 0]])
    assert guard.broken_by(away) == APART
    assert guard.broken_by(away, whole=False) == ""
    for strange in (near, away):
        atoms = WATER.atoms()
        atoms.positions[:] = strange
        assert Guard(start(atoms), Limits()).broken_by(strange) == ""


def test_a_start_without_atoms_that_can_move_stays() -> None:
    rigid = start(molecule("H2O"), fixed=[0, 1, 2])
    group = teacher_dynamics([rigid], Settings(mode=MD, steps=4, every=2), wells(rigid))
    assert all((one.pos == rigid.pos).all() for one in group.found)
