"""Rounds: train, explore with the student, have the teacher speak of what was found, train on."""

from __future__ import annotations
