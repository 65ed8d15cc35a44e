"""One running server with an API key for all tests that only ask; others where they need one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from servers import KEY, Server


@pytest.fixture(scope="session")
def launch(model_dir: Path, tmp_path_factory) -> Iterator[Callable[..., Server]]:
    """Starts servers; all are ended with the tests."""
    folder = tmp_path_factory.mktemp("servers")
    servers: list[Server] = []

    def start(*options: str, key: str | None = None) -> Server:
        servers.append(Server(model_dir, folder, *options, key=key))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def keyed(launch: Callable[..., Server]) -> Server:
    """A running server with an API key, for tests that leave it as it was."""
    return launch(key=KEY).wait()


@pytest.fixture
def http(keyed: Server) -> Iterator[httpx.Client]:
    """A client of that server, with its key."""
    with keyed.client() as client:
        yield client
