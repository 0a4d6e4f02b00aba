"""`steerkit monitor`, three readings behind one command.

`score` projects prompts and answers on a vector, `shift` compares a model with a finetuned one, `difference` compares
the responses of a data set with the model's own. `command` holds the options and refuses what does not go together,
`asked` is what all three get, `items` reads, `summary` writes.
"""

from steerkit.cli.monitor.command import run

__all__ = ["run"]
