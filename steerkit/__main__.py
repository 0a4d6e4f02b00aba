"""`python -m steerkit` is the program `steerkit`."""

from __future__ import annotations

from steerkit.cli import main

if __name__ == "__main__":
    main()
