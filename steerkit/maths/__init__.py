"""Tensors in, tensors out: nothing here knows a model, a prompt or a file.

`directions` finds them, `edits` applies them, `probes` separates with them, `rank_one` edits matrices by them,
`predicates` combines conditions.
"""
