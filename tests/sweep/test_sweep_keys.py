"""The keys of a sweep: where their values go, and which no config has."""

from __future__ import annotations

import pytest
from sweeps import BASE, E2N

from fairchem_kd.errors import UserError
from fairchem_kd.sweep.keys import with_values


def test_values_go_where_their_keys_say():
    config = with_values(
        BASE,
        {
            "loss_functions.1.forces.coefficient": 5,
            f"{E2N}.schedule.decay": "cosine",
            "task.distillation.losses.n2n.coefficient": 3,
            "optim.eta_min": 1e-6,  # the scheduler's
            "optim.optimizer_params.weight_decay": 0.1,
            "optim.ema_decay": 0.99,
            "model.num_rbf": 16,
            "model.rbf": {"name": "gaussian"},  # the model's, not in the base
            "dataset.train.first_n": 100,
            "amp": True,
        },
        "here",
    )
    assert config["loss_functions"][1]["forces"]["coefficient"] == 5
    assert config["task"]["distillation"]["losses"]["e2n"] == {"schedule": {"decay": "cosine"}}
    assert config["task"]["distillation"]["losses"]["n2n"] == {"coefficient": 3}
    assert config["optim"]["optimizer_params"] == {"weight_decay": 0.1}
    assert BASE["loss_functions"][1]["forces"]["coefficient"] == 10
    plain = {**BASE, "task": {"distillation": {**BASE["task"]["distillation"], "losses": None}}}
    config = with_values(plain, {f"{E2N}.coefficient": 3}, "here")
    assert config["task"]["distillation"]["losses"] == {"e2n": {"coefficient": 3}}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optm.lr_initial", 1, "no config has the key optm.lr_initial.*did you mean 'optim'"),
        ("optim.lr_inital", 1, "optim has no 'lr_inital'.*did you mean 'lr_initial'"),
        ("optim.optimizer_parms.amsgrad", True, "did you mean 'optimizer_params'"),
        ("model.hidden_chanels", 8, "model has no 'hidden_chanels'.*'hidden_channels'"),
        ("dataset.trian.src", "x", "dataset has no 'trian'.*did you mean 'train'"),
        ("dataset.train.formt", "x", "train has no 'formt'"),
        ("loss_functions.2.forces.coefficient", 1, "loss_functions is a list of 2"),
        ("logger.name", "x", "logger is 'tensorboard'"),
        (f"{E2N}.coeficient", 1, "unknown key 'coeficient' .did you mean 'coefficient'"),
        (f"{E2N}.coefficient", -1, "e2n.coefficient must be at least 0"),
        ("task.distillation.losses.e3n", {}, "did you mean 'e2n'"),
        ("task.distilation.losses.e2n", {}, "did you mean 'distillation'"),
    ],
)
def test_a_key_that_no_config_has_is_refused(key, value, words):
    with pytest.raises(UserError, match=f"^sweep.yml: .*{words}"):
        with_values(BASE, {key: value}, "sweep.yml")


def test_distillation_keys_need_a_trainer_that_distils():
    with pytest.raises(UserError, match="has no effect, because the config's trainer is ocp"):
        with_values({**BASE, "trainer": "ocp"}, {f"{E2N}.coefficient": 1}, "sweep.yml")
