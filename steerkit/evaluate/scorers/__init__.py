"""One scorer a file; every one gives a number per item, so that intervals exist."""
