"""Sparse-autoencoder dictionaries: latents of activations, read from the files of those who train them.

`dictionary` is one dictionary and what it computes, `activation` which latents fire, `stored` its file. `reading` tells
the formats apart and `gemma_scope`, `llama_scope`, `saelens` and `sparsify` read one each, `hook_names` places them in
the model, `fitness` measures how well one fits a model, `selecting` tells which latents part two sides.
"""

from __future__ import annotations

from steerkit.dictionary.dictionary import Dictionary
from steerkit.dictionary.reading import load_dictionary

__all__ = ["Dictionary", "load_dictionary"]
