"""Rattled copies, rattling and relaxing, and a student's dynamics beside its teacher's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from ase import units
from ase.build import molecule
from explorations import Wells, start, wells

from fairchem_kd.explore.following import BELOW, BEYOND, CRASHED, find_window, student_dynamics
from fairchem_kd.explore.guards import CLOSE, STRONG, Limits
from fairchem_kd.explore.potentials import Answer
from fairchem_kd.explore.rattling import NO_ANSWER, rattle
from fairchem_kd.explore.relaxing import REJECTED, relax
from fairchem_kd.explore.settings import RELAX, STUDENT, Settings, Window

ETHANOL, WATER = start(molecule("CH3CH2OH"), fixed=[0, 4]), start(molecule("H2O"))
LOOSE = Limits(min_distance=0.0, max_gap=1e3, max_force=1e6)


def test_copies_are_displaced_by_each_scale_in_turn_and_by_their_own_numbers() -> None:
    settings = Settings(copies=300, std=(0.02, 0.1), limits=LOOSE)
    group = rattle([ETHANOL, WATER], settings, None)
    assert [one.start for one in group.found] == [0] * 300 + [1] * 300
    for std in settings.std:
        of_one = [one.pos - ETHANOL.pos for one in group.found[:300] if one.value == std]
        noise = np.stack(of_one)
        assert (noise[:, [0, 4]] == 0).all()
        assert noise[:, [1, 2, 3, 5]].std() == pytest.approx(std, rel=0.05)
        assert abs(noise.mean()) < 0.1 * std
    alone = rattle([WATER], settings, None).found
    assert all((a.pos == b.pos).all() for a, b in zip(alone, group.found[300:], strict=True))
    other = rattle([WATER], replace(settings, seed=1), None).found
    assert all((a.pos != b.pos).all() for a, b in zip(alone, other, strict=True))


def test_copies_have_a_teachers_labels_and_too_large_forces_are_left_out() -> None:
    settings = Settings(copies=40, std=(0.3,), limits=Limits(0.0, 1e3, 2.0), batch=7)
    potential = wells(WATER)
    group = rattle([WATER], settings, potential)
    assert potential.asked == [7] * 5 + [5]
    assert group.counts[STRONG] == 40 - len(group.found) > 0
    for one in group.found:
        assert one.answer.energy == pytest.approx(2.5 * np.sum((one.pos - WATER.pos) ** 2))


def test_copies_with_atoms_too_close_are_drawn_anew_and_given_up() -> None:
    group = rattle([WATER], Settings(copies=20, std=(0.2,), limits=Limits(3.0, 1e3)), None)
    assert group.counts[CLOSE] == 20 - len(group.found) > 0


def relaxing(temperature: float, **more: object) -> Settings:
    given = {"copies": 60, "std": (0.05,), "relax_steps": 6, "limits": LOOSE, **more}
    return Settings(mode=RELAX, temperature=(temperature, temperature), **given)


def test_without_heat_only_what_lies_lower_is_taken() -> None:
    shifted = Wells({3: WATER.pos + 0.3})  # so that there is a way down
    group = relax([WATER], relaxing(1e-6), shifted)
    energies = [shifted.answer(WATER.atoms()).energy, *(one.answer.energy for one in group.found)]
    assert len(energies) > 10
    assert all(later <= before for before, later in pairwise(energies))
    assert group.counts[REJECTED] == 60 - len(group.found) > 0
    assert energies[-1] < 0.5 * energies[0]


def test_it_is_taken_as_often_as_metropolis_says() -> None:
    """Without steps down: from the bottom of a well each first copy lies uphill by a known energy.

    Counted over many seeds, against the sum of the probabilities.
    """
    taken, expected = 0, 0.0
    kelvin = 300.0
    for seed in range(300):
        settings = relaxing(kelvin, copies=1, relax_steps=0, seed=seed)
        group = relax([WATER], settings, wells(WATER))
        generator = WATER.generator(seed, "relax", 0)
        generator.integers(0, 1)
        pos = WATER.settled(WATER.pos + 0.05 * generator.standard_normal((3, 3)))
        uphill = wells(WATER).answer(_at(pos)).energy / 3
        expected += min(1.0, np.exp(-uphill / (units.kB * kelvin)))
        taken += len(group.found)
    assert 20 < expected < 280
    assert abs(taken - expected) < 4 * np.sqrt(expected * (1 - expected / 300))


def _at(pos: np.ndarray):  # type: ignore[no-untyped-def]
    atoms = WATER.atoms()
    atoms.positions[:] = pos
    return atoms


def test_chains_are_asked_about_together_and_do_not_touch() -> None:
    settings = relaxing(300.0, copies=3)
    together = relax([ETHANOL, WATER], settings, wells(ETHANOL, WATER))
    alone = relax([WATER], settings, wells(WATER))
    of_water = [one for one in together.found if one.start == 1]
    assert [one.answer.energy for one in of_water] == [one.answer.energy for one in alone.found]
    for one in together.found:
        if one.start == 0:
            assert (one.pos[[0, 4]] == ETHANOL.pos[[0, 4]]).all()


def test_a_teacher_that_says_nothing_is_counted() -> None:
    class Silent(Wells):
        def answer(self, atoms):  # type: ignore[no-untyped-def]
            return None

    group = relax([WATER], relaxing(300.0, copies=2), Silent({3: WATER.pos}))
    assert group.counts == {NO_ANSWER: 1}
    assert not group.found
    assert rattle([WATER], Settings(copies=2), Silent({3: WATER.pos})).counts == {NO_ANSWER: 2}


def following(low: float, high: float, **more: object) -> Settings:
    given = {"steps": 40, "every": 4, "limits": LOOSE, "friction": 0.0, **more}
    return Settings(mode=STUDENT, window=Window(low, high), **given)


def test_frames_are_kept_where_student_and_teacher_differ_within_the_window() -> None:
    """The student's forces are 1.5 times the teacher's, so that they differ by half of these."""
    student, teacher = wells(WATER, factor=1.5), wells(WATER)
    everything = student_dynamics([WATER], following(0.0, 1e9), student, teacher)
    assert len(everything.found) == len(everything.differences) == 10
    for one, apart in zip(everything.found, everything.differences, strict=True):
        half = 0.5 * np.linalg.norm(one.answer.forces, axis=1).max()
        assert one.value == apart == pytest.approx(half)
        assert one.answer.energy == teacher.answer(_at(one.pos)).energy
    middle = float(np.median(everything.differences))
    upper = student_dynamics([WATER], following(middle, 1e9), student, teacher)
    assert [one.value for one in upper.found] == [d for d in everything.differences if d >= middle]
    assert upper.counts[BELOW] == 5
    first = next(i for i, d in enumerate(everything.differences) if d > middle)
    lower = student_dynamics([WATER], following(0.0, middle), student, teacher)
    assert len(lower.found) == first  # beyond the window nothing makes sense any more
    assert lower.counts == {BEYOND: 1}


def test_fixed_atoms_do_not_count() -> None:
    class Pulls(Wells):
        def answer(self, atoms):  # type: ignore[no-untyped-def]
            said = super().answer(atoms)
            said.forces[[0, 4]] += 100.0
            return said

    student = Pulls({9: ETHANOL.pos})
    group = student_dynamics([ETHANOL], following(0.0, 1.0), student, wells(ETHANOL))
    assert group.differences == [0.0] * 10


def test_the_last_frames_before_a_crash_are_kept_as_far_as_the_teacher_can_say_something() -> None:
    class Cliff(Wells):
        """Beyond 0.04 Å from the well's middle its forces explode."""

        def answer(self, atoms):  # type: ignore[no-untyped-def]
            said = super().answer(atoms)
            away = np.abs(atoms.positions - WATER.pos).max()
            return said if away < 0.04 else Answer(said.energy, said.forces * 1e9)

    settings = following(0.0, 1e9, every=20, steps=200, time_step=0.25, before_crash=2,
                         temperature=(150.0, 150.0), limits=Limits(0.1, 50.0, 1e3))  # fmt: skip
    group = student_dynamics([WATER], settings, Cliff({3: WATER.pos}), wells(WATER))
    assert group.counts[CRASHED] == 1
    crash = [one for one in group.found if one.kind == "crash"]
    assert len(crash) == 2
    reach = [np.abs(one.pos - WATER.pos).max() for one in crash]
    assert reach[1] < reach[0] < 0.04  # the last good one first
    assert group.counts[f"dynamics ended: {STRONG}"] == 1
    steep = wells(WATER, stiffness=1e7)  # of whose forces none is below the limit
    none = student_dynamics([WATER], settings, Cliff({3: WATER.pos}), steep)
    assert not [one for one in none.found if one.kind == "crash"]


def test_a_window_begins_where_nine_in_ten_of_the_given_structures_end() -> None:
    starts = []
    for place in range(20):
        atoms = molecule("H2O")
        atoms.positions[1] += [0.01 * (place + 1), 0, 0]
        starts.append(start(atoms, place=place))
    student, teacher = wells(WATER, factor=1.1), wells(WATER)
    window = find_window(starts, student, teacher)
    apart = [0.1 * 5.0 * 0.01 * (place + 1) for place in range(20)]
    assert window.low == pytest.approx(np.quantile(apart, 0.9), rel=0.01)
    assert window.high == pytest.approx(10 * window.low, rel=0.01)
    assert max(student.asked) == 4
