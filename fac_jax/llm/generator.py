"""Who answers the requests of a run, by its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fac_jax.config.file import Config
from fac_jax.llm.client import Directions, Generator

if TYPE_CHECKING:
    from jax.sharding import Mesh


def open_generator(config: Config, mesh: Mesh, directions: Directions | None = None) -> Generator:
    """The server at `llm.url`, or the backbone itself when there is none; only the latter needs `directions`, and only
    to be steered. Raises UserError when it is not there."""
    # Imported late: with a server, the backbone's weights for decoding are never read, and the other way round.
    if config.llm.url is None:
        from fac_jax.llm.local import open_local

        return open_local(config, mesh, directions)
    from fac_jax.llm.http import open_server

    return open_server(config)
