"""What every room uses and no user sees: plugins by name, files written whole, journals that a killed run goes on
from, the endpoint of a language model over HTTP, phrases, and what is shipped.
"""
