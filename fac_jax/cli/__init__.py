"""`fac VERB CONFIG [--section.field value]`: the command line, thin."""

from fac_jax.cli.entry import main

__all__ = ["main"]
