"""The container files, read as Docker and Compose would, without an engine.

`docker/check.sh` builds and runs the image where there is one.
"""

import ast
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
DOCKERFILES = sorted(FOLDER.glob("Dockerfile.*"))
CACHES = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")


def parsed(file: Path) -> DockerfileParser:
    """A Dockerfile, as the library reads it; it takes a path for a folder's."""
    return DockerfileParser(fileobj=io.BytesIO(file.read_bytes()))


def instructions(file: Path) -> list[dict[str, Any]]:
    """Instructions of a Dockerfile in order, comments left out."""
    return [line for line in parsed(file).structure if line["instruction"] != "COMMENT"]


def last_stage(file: Path) -> list[dict[str, Any]]:
    """Instructions of the stage that becomes the image."""
    lines = instructions(file)
    start = max(i for i, line in enumerate(lines) if line["instruction"] == "FROM")
    return lines[start:]


def value_of(file: Path, name: str) -> str:
    """Value of the image's one instruction of that name."""
    (line,) = [line for line in last_stage(file) if line["instruction"] == name]
    return line["value"]


def environment(file: Path) -> dict[str, str]:
    """Variables that the image sets."""
    return parsed(file).envs


def compose() -> dict[str, Any]:
    """The compose file."""
    return yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))


def test_there_are_two_images() -> None:
    """The tests over images have something to read."""
    assert [file.name for file in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    """Dockerfiles keep hadolint's rules, down to its hints."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--failure-threshold", "style", file], capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_base_images_are_pinned(file: Path) -> None:
    """Every stage begins with an image of a fixed version, or with another stage."""
    stages = [line["value"] for line in instructions(file) if line["instruction"] == "FROM"]
    tags = [stage.split()[0].rpartition(":")[2] for stage in stages if stage != "vllm-${VLLM}"]
    assert all(tag[:1].isdigit() or tag[:2] == "v0" for tag in tags), stages


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_server_is_no_root(file: Path) -> None:
    """The image's last user is a number other than 0, as Kubernetes asks for."""
    users = [line["value"] for line in last_stage(file) if line["instruction"] == "USER"]
    user, group = users[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_caches_are_on_the_volume(file: Path) -> None:
    """With a read-only root, all that is kept can still be written."""
    volume = value_of(file, "VOLUME")
    found = environment(file)
    assert all(Path(found[name]).is_relative_to(volume) for name in CACHES)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_health_check_is_python(file: Path) -> None:
    """The check is a program of the image that asks the port the server listens on."""
    command = json.loads(value_of(file, "HEALTHCHECK").partition("CMD")[2])
    ast.parse(command[-1])
    assert f":{value_of(file, 'EXPOSE')}/health" in command[-1]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_copied_files_exist_and_are_sent(file: Path) -> None:
    """What an image copies is in the repository, and .dockerignore lets it through."""
    kept = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    copies = [line["value"].split() for line in instructions(file) if line["instruction"] == "COPY"]
    sources = [
        source for words in copies if not words[0].startswith("--from") for source in words[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in kept


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["/models/needle", "--served-model-name", "needle"]),
        (["--max-model-len", "64"], ["/models/needle", "--served-model-name", "needle"]),
        (["org/model", "--port", "9"], ["org/model", "--port", "9"]),
    ],
)
def test_entry_point(tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    """No model means the bundled one; the caller's options come last, and so win."""
    stand_in = tmp_path / "razor"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    stand_in.chmod(0o755)
    done = subprocess.run(
        [FOLDER / "serve.sh", *arguments],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "RAZOR_OPTIONS": "--enforce-eager"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    assert words[:2] == ["serve", expected[0]]
    assert words[2:7] == ["--host", "0.0.0.0", "--port", "8000", "--enforce-eager"]
    assert set(expected[1:]) <= set(words)
    assert words[len(words) - len(arguments[-2:]) :] == arguments[-2:]


def test_compose_mounts_exist() -> None:
    """Every file that a service mounts is in the repository."""
    services = compose()["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    mounts = [mount for service in services.values() for mount in service["volumes"]]
    files = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(files) == 3
    assert all((FOLDER / file).exists() for file in files)


def test_compose_volumes_are_declared() -> None:
    """Every named volume is declared, and each declared one is used."""
    services = compose()["services"]
    mounts = [mount for service in services.values() for mount in service["volumes"]]
    named = {mount.split(":")[0] for mount in mounts if not mount.startswith(".")}
    assert named == set(compose()["volumes"])


def test_compose_opens_no_port_to_the_network() -> None:
    """Each published port is bound to this machine's loopback address."""
    ports = [port for service in compose()["services"].values() for port in service["ports"]]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_asks_the_server() -> None:
    """Prometheus scrapes the service of compose.yaml, on the port of the image."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [
        {"targets": [f"server:{value_of(FOLDER / 'Dockerfile.cpu', 'EXPOSE')}"]}
    ]


def test_server_runs_with_little() -> None:
    """The server's root is read-only, /tmp is memory, and no capability is left."""
    server = compose()["services"]["server"]
    assert server["read_only"] is True
    assert server["tmpfs"] == ["/tmp"]
    assert server["cap_drop"] == ["ALL"]
