"""Scorers, one a file: each gives a number per item, so that intervals exist."""
