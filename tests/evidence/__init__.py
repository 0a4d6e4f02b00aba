"""Tests of steerkit.evidence."""
