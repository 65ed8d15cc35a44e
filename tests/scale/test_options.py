"""From the application's options to Ray's and vLLM's configuration."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.llm.request_router import PrefixCacheAffinityRouter
from ray.serve.schema import ServeDeploySchema

from razor_serving.ray_app import AppOptions, app, engine_options, llm_config

pytestmark = pytest.mark.ray
DOCKER = Path(__file__).parents[2] / "docker"
FILES = sorted(DOCKER.glob("ray-serve*.yaml"))


def options(**changes: Any) -> AppOptions:
    """Options of a model on CPUs."""
    return AppOptions(**{"model": "org/model", "accelerator": "cpu", **changes})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_configuration_files_are_accepted(file: Path) -> None:
    """Each file fits Ray's schema, and its arguments fit ours."""
    config = ServeDeploySchema(**yaml.safe_load(file.read_text(encoding="utf-8")))
    (application,) = config.applications
    assert application.import_path == "razor_serving.ray_app:app"
    assert llm_config(AppOptions(**application.args)).get_engine_config()


def test_there_are_configuration_files() -> None:
    """The test above has something to read."""
    assert len(FILES) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"razor": {"windw": 1}}, "unknown option windw"),
        ({"razor": {"window": -1}}, "window is -1"),
        ({"window": 1}, "window"),
        ({"replicas": 0}, "replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3, above max_replicas 2"),
        ({"accelerator": "tpu"}, "'cpu' or 'gpu'"),
        ({"routing": "random"}, "'prefix' or 'balanced'"),
        ({"placement": "NEAR"}, "STRICT_PACK"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], message: str) -> None:
    """A wrong name or value stops the application before any engine starts."""
    with pytest.raises(ValidationError, match=message):
        options(**changes)


def test_unknown_engine_option_is_refused() -> None:
    """vLLM's options are checked when the application is built."""
    with pytest.raises(ValueError, match="Unknown engine argument: kv_policy"):
        app(options(engine={"kv_policy": "razor"}))


def test_policy_travels_in_additional_config() -> None:
    """The engine gets the policy's options beside others' additional ones."""
    chosen = options(razor={"window": 512}, engine={"additional_config": {"other": 1}})
    engine = llm_config(chosen).get_engine_config().get_initialization_kwargs()
    assert engine["additional_config"] == {
        "other": 1,
        "razor": {"policy": "razor", "window": 512},
    }


def test_policy_in_two_places_is_refused() -> None:
    """One of two sets of options would be ignored."""
    with pytest.raises(ValueError, match="not in 'engine'"):
        engine_options(options(engine={"additional_config": {"razor": {}}}))


def test_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines run in other folders; hub names stay as they are."""
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    assert options(model="weights").model == str(tmp_path / "weights")
    assert options(model="org/weights").model == "org/weights"


def test_two_nodes_of_four_gpus() -> None:
    """Tensor and pipeline parallelism reserve a GPU for each worker, by Ray's executor."""
    chosen = AppOptions(
        model="org/model",
        accelerator_type="H100",
        placement="SPREAD",
        engine={"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
    )
    engine = llm_config(chosen).get_engine_config()
    assert engine.placement_strategy == "SPREAD"
    assert [bundle["GPU"] for bundle in engine.placement_bundles] == [1.0] * 8
    assert all("accelerator_type:H100" in bundle for bundle in engine.placement_bundles)
    assert engine.get_initialization_kwargs()["distributed_executor_backend"] == "ray"


def test_cpus_reserve_no_gpu() -> None:
    """An engine on CPUs asks for cores only, and does not bind its threads to them."""
    config = llm_config(options(worker_cpus=3))
    engine = config.get_engine_config()
    assert engine.placement_bundles == [{"CPU": 3.0}]
    assert engine.get_initialization_kwargs()["distributed_executor_backend"] == "mp"
    assert config.runtime_env == {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"replicas": 3}, {"num_replicas": 3}),
        (
            {"min_replicas": 0, "max_replicas": 8, "target_ongoing_requests": 5},
            {
                "autoscaling_config": {
                    "min_replicas": 0,
                    "max_replicas": 8,
                    "target_ongoing_requests": 5,
                }
            },
        ),
    ],
)
def test_scaling(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """A number of engines is fixed; without one Ray scales between two."""
    deployment = llm_config(options(**changes)).deployment_config
    found = {name: deployment.get(name) for name in ("num_replicas", "autoscaling_config")}
    assert {name: value for name, value in found.items() if value is not None} == expected


@pytest.mark.parametrize(("routing", "expected"), [("prefix", True), ("balanced", False)])
def test_routing(routing: str, expected: bool) -> None:
    """`prefix` asks for Ray's prefix-aware router, `balanced` for its default one."""
    router = llm_config(options(routing=routing)).deployment_config.get("request_router_config")
    found = router is not None and router.get_request_router_class() is PrefixCacheAffinityRouter
    assert found == expected
