"""A local Ray cluster for the tests of this folder."""

from collections.abc import Iterator

import pytest
import ray_cluster


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of these tests."""
    config.addinivalue_line("markers", "ray: needs Ray; some start a local cluster")


@pytest.fixture(scope="module")
def cluster() -> Iterator[ray_cluster.Cluster]:
    """Two engines under Ray Serve."""
    with ray_cluster.running() as found:
        yield found
