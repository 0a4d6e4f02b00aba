"""What every room uses and no user sees.

`plugins` finds classes by name, `files` writes files whole, `journal` lets a killed run go on, `endpoint` asks a
language model over HTTP, `phrases` finds words in texts, `shipped` knows where recipes and vectors lie.
"""
