"""One file, one published method; no method imports another. `steerkit.methods.caa` is the file `caa.py`."""
