"""Engines of others, steered: one room each. Nothing of them is imported before it is needed."""

from __future__ import annotations
