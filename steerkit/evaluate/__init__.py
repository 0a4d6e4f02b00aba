"""Whether steering worked, and what it cost."""
