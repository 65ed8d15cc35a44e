"""What is not covered is refused at start-up, naming what was found and what is covered."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hybrids
import make_random_llama
import pytest
import torch
from engines import NO_HEADS, engine, profile_file
from vllm.config import get_layers_from_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends import registry

from razor_vllm import compat
from razor_vllm.heads.profile import read_profile
from razor_vllm.support import check_engine, check_foreign, check_layers

RAZOR = {"razor": {"window": 64}}
CONFIGS = (
    "model_config",
    "cache_config",
    "parallel_config",
    "scheduler_config",
    "attention_config",
    "kv_transfer_config",
    "speculative_config",
)
MODEL = (
    "runner_type",
    "use_mla",
    "is_attention_free",
    "is_encoder_decoder",
    "is_mm_prefix_lm",
)
PARALLEL = (
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
    "enable_dbo",
)


def model_with(model_dir: Path, folder: Path, **changes: Any) -> Path:
    """The bundled model with another configuration."""
    shutil.copytree(model_dir, folder / "model")
    path = folder / "model" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(config))
    return folder / "model"


def create(model: Path, additional_config: dict[str, Any] = RAZOR, **options: Any):
    options = {"max_model_len": 1024, **options}
    return EngineArgs(
        model=str(model), additional_config=additional_config, **options
    ).create_engine_config()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "a KV cache of fp8_e5m2"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"runner": "pooling"}, "a pooling model"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "a KV connector",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_engine_features_that_are_not_covered(model_dir: Path, options, found: str) -> None:
    """Features are refused before a model is loaded."""
    with pytest.raises(NotImplementedError) as error:
        create(model_dir, **options)
    assert f"razor: {found} is not covered" in str(error.value)
    assert "Covered are decoder models" in str(error.value)


def test_models_that_are_not_covered(model_dir: Path, tmp_path: Path) -> None:
    """Kinds of model are refused before the model is loaded."""
    mamba = {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    with pytest.raises(NotImplementedError, match="Mamba"):
        create(model_with(model_dir, tmp_path, **mamba))


@pytest.mark.parametrize(
    ("where", "name", "value", "found"),
    [
        ("model_config", "use_mla", True, "multi-head latent attention (MLA)"),
        ("model_config", "is_encoder_decoder", True, "an encoder-decoder model"),
        ("model_config", "is_mm_prefix_lm", True, "attention that is not causal"),
        ("parallel_config", "decode_context_parallel_size", 2, "decode context parallelism of 2"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallel"),
        ("parallel_config", "enable_dbo", True, "dual-batch overlap"),
    ],
)
def test_configurations_that_are_not_covered(
    model_dir: Path, where: str, name: str, value: Any, found: str
) -> None:
    """What this machine cannot build a real configuration of, set by hand."""
    real = create(model_dir)
    changed = SimpleNamespace(**{field: getattr(real, field) for field in CONFIGS})
    part = getattr(real, where)
    names = MODEL if where == "model_config" else PARALLEL
    values = {field: getattr(part, field) for field in names}
    setattr(changed, where, SimpleNamespace(**{**values, name: value}))
    with pytest.raises(NotImplementedError) as error:
        check_engine(changed)  # type: ignore[arg-type]
    assert found in str(error.value)


@pytest.mark.parametrize(
    ("method", "draft", "found"),
    [
        ("medusa", "medusa", "speculative decoding by medusa"),
        ("mtp", "gemma4_mtp", "an MTP model that shares the model's K and V"),
        ("mtp", "qwen3_next_mtp", None),
        ("ngram", None, None),
    ],
)
def test_drafts_that_are_not_covered(
    model_dir: Path, method: str, draft: str | None, found: str | None
) -> None:
    """Known before the model is loaded."""
    real = create(model_dir)
    changed = SimpleNamespace(**{field: getattr(real, field) for field in CONFIGS})
    config = draft and SimpleNamespace(hf_config=SimpleNamespace(model_type=draft))
    changed.speculative_config = SimpleNamespace(method=method, draft_model_config=config)
    refused = pytest.raises(NotImplementedError, match=found) if found else nullcontext()
    with refused:
        check_engine(changed)  # type: ignore[arg-type]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": 128,
            },
            "a model without full attention .caches: SlidingWindowSpec",
        ),
    ],
    ids=["sliding-window"],
)
def test_layers_that_are_not_covered(model_dir: Path, tmp_path: Path, changes, found) -> None:
    """Kinds of layer are refused when the model is loaded, not served in silence."""
    model = model_with(model_dir, tmp_path, **changes)
    with (
        pytest.raises(NotImplementedError, match=found),
        engine(model, {"window": 64}, max_model_len=1024, load_format="dummy"),
    ):
        pass


@pytest.mark.engine
@pytest.mark.parametrize("skipped", ["0", "3"])
def test_layers_of_unequal_cache_types_are_refused(model_dir: Path, skipped: str) -> None:
    """`--kv-cache-dtype-skip-layers`: a page holds heads of all layers, in one type."""
    with (
        pytest.raises(NotImplementedError, match="layers differ in kv_cache_dtype"),
        engine(
            model_dir,
            {"window": 64},
            max_model_len=1024,
            kv_cache_dtype="fp8",
            kv_cache_dtype_skip_layers=[skipped],
        ),
    ):
        pass


@pytest.mark.engine
def test_scales_per_head_are_refused(model_dir: Path) -> None:
    """The kernels take one scale a layer, as checkpoints mostly have it."""
    with engine(model_dir, max_model_len=1024) as llm:
        vllm_config = llm.llm_engine.vllm_config
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        check_layers(layers)
        last = list(layers.values())[-1]
        last._v_scale = torch.ones(last.num_kv_heads)
        with pytest.raises(NotImplementedError, match="scale of the KV cache for each head"):
            check_layers(layers)


def test_bad_profiles_stop_the_start(model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """Missing, of another model, or empty of retrieval heads."""
    with pytest.raises(ValueError, match="cannot read head profile /none.json"):
        create(model_dir, {"razor": {"head_profile": "/none.json"}})
    other = model_with(model_dir, tmp_path, num_key_value_heads=2)
    make_random_llama.make_model(261, 0, make_random_llama.Shape(num_kv_heads=2)).save_pretrained(
        other
    )
    with pytest.raises(ValueError, match="this model has 4, 2 and 32"):
        create(other)
    (other / "razor_profile.json").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no head profile"):
        create(other)
    razor = create(other, {"razor": {"calibrate": True}}).additional_config["razor"]
    made = read_profile(razor["head_profile"])
    assert (made.num_layers, made.num_kv_heads) == (4, 2)
    assert Path(razor["head_profile"]).is_relative_to(tmp_path / "cache")
    with pytest.raises(ValueError, match="names no retrieval head"):
        create(model_dir, {"razor": {"head_profile": profile_file(tmp_path, NO_HEADS)}})


def test_bad_options_stop_the_start(model_dir: Path) -> None:
    """Unknown keys and lengths above the model's."""
    with pytest.raises(ValueError, match="unknown option budget"):
        create(model_dir, {"razor": {"budget": 3}})
    assert create(model_dir, {"razor": {}}).additional_config["razor"]["window"] == 1024
    with pytest.raises(ValueError, match="window is 2048, above the model length of 1024"):
        create(model_dir, {"razor": {"window": 2048}})


def parse(*flags: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(flags)))


def test_flags_and_additional_config_are_one(model_dir: Path) -> None:
    """The flags end in `additional_config`, beside what is there already."""
    flags = ["--model", str(model_dir), "--kv-policy", "razor", "--razor-window", "64"]
    extra = ["--additional-config", '{"other": 1, "razor": {"sinks": 8}}']
    args = parse(*flags, *extra, "--razor-prefill", "windowed")
    assert args.additional_config == {
        "other": 1,
        "razor": {"policy": "razor", "window": 64, "prefill": "windowed", "sinks": 8},
    }
    assert not parse("--model", str(model_dir)).additional_config
    # An explicit full wins over what else is said.
    off = parse("--model", str(model_dir), "--kv-policy", "full", *extra)
    assert off.additional_config == {"other": 1}
    with pytest.raises(ValueError, match="--razor-sinks has no effect"):
        parse("--model", str(model_dir), "--razor-sinks", "8")
    with pytest.raises(ValueError, match="policy is 'h2o'; accepted are full, razor"):
        parse("--model", str(model_dir), "--kv-policy", "h2o")


def test_another_attention_backend_cannot_pass_in_silence(model_dir: Path, monkeypatch) -> None:
    """If the pools do not attach, start-up fails; it does not serve full attention."""
    from razor_vllm import backend

    monkeypatch.setattr(backend, "attach", lambda vllm_config, backend: None)
    with (
        pytest.raises(RuntimeError, match="did not attach"),
        engine(model_dir, {"window": 64}),
    ):
        pass


def test_other_api_servers_need_no_profile_file(model_dir: Path, tmp_path, monkeypatch) -> None:
    """They make their configuration from the same flags, when the file may be gone."""
    monkeypatch.chdir(tmp_path)
    path = Path(profile_file(tmp_path, [[0], [1], [], []]))
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", str(model_dir), "--max-model-len", "1024", "--kv-policy", "razor"]
    args = parser.parse_args([*flags, "--razor-head-profile", path.name])
    first = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    path.unlink()
    second = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert second.additional_config == first.additional_config


def test_another_plugins_backend_is_left_alone(model_dir: Path, monkeypatch) -> None:
    """What stands under our backend's name already stays there, and the policy is refused."""
    from razor_vllm import compat

    theirs = "their.own.Backend"
    monkeypatch.setitem(registry._ATTN_OVERRIDES, registry.AttentionBackendEnum.CUSTOM, theirs)
    compat.install()
    assert registry.AttentionBackendEnum.CUSTOM.get_path() == theirs
    with pytest.raises(RuntimeError, match="under the name CUSTOM, found their.own.Backend"):
        create(model_dir)


def test_another_series_of_vllm_is_refused(monkeypatch) -> None:
    """The patches were written against some series."""
    import vllm

    from razor_vllm import guard

    guard.check_version()
    for other in ("0.99.1", "1.0.0", "dev"):
        monkeypatch.setattr(vllm, "__version__", other)
        with pytest.raises(RuntimeError, match=rf"expected vLLM .*0.32.x.*, found {other}"):
            guard.check_version()


@pytest.mark.engine
def test_streamed_input_is_refused(model_dir: Path) -> None:
    """A prompt that grows while it runs has no fixed end of its dense part."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with engine(model_dir, {"window": 64}) as llm:
        processor = llm.llm_engine.input_processor
        prompt = {"prompt_token_ids": [0, 5, 6]}
        params, tasks = SamplingParams(), ("generate",)
        assert processor.process_inputs("a", prompt, params, tasks).request_id
        with pytest.raises(VLLMValidationError, match="streamed input is not covered"):
            processor.process_inputs("b", prompt, params, tasks, resumable=True)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    """A tiny Gemma 3, with a profile."""
    folder = hybrids.make("gemma3", tmp_path_factory.mktemp("hybrids") / "gemma3")
    (folder / "razor_profile.json").write_text(hybrids.some_heads(folder).to_json())
    return folder


OTHER_PATTERN = ["full_attention", *["sliding_attention"] * 6]


@pytest.mark.parametrize(
    ("changes", "options", "found"),
    [
        ({"layer_types": OTHER_PATTERN}, {}, "layers are 2, 5; this model's are 0"),
        ({"layer_types": ["sliding_attention"] * 7}, {}, "a model without full attention"),
        ({}, {"attention_backend": "FLEX_ATTENTION"}, "FLEX_ATTENTION cannot read pages"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline parallelism of a model with sliding"),
    ],
    ids=["pattern", "no-full-layer", "layout", "stages"],
)
def test_hybrids_that_are_not_covered(hybrid: Path, tmp_path, changes, options, found) -> None:
    """What the configuration tells is refused before the model is loaded."""
    model = model_with(hybrid, tmp_path, **changes)
    options = {"skip_tokenizer_init": True, **options}
    with pytest.raises((ValueError, NotImplementedError), match=found) as error:
        create(model, **options)
    assert len(str(error.value).splitlines()) == 1


def test_a_backend_of_the_other_layers_may_be_named(hybrid: Path, model_dir: Path) -> None:
    """In a hybrid it is that of the other layers; else there is no layer for it."""
    backend = {"attention_backend": "TRITON_ATTN"}
    attention = create(hybrid, skip_tokenizer_init=True, **backend).attention_config
    assert attention.backend.name == "TRITON_ATTN"
    assert attention.backend_per_kind["full_attention"].name == "CUSTOM"
    with pytest.raises(ValueError, match="TRITON_ATTN and --kv-policy razor exclude each other"):
        create(model_dir, **backend)


@pytest.mark.engine
def test_layers_beside_the_split_ones_that_are_not_covered(hybrid: Path) -> None:
    """Layers that share another's cache, caches of another kind, backends of another layout."""
    with engine(hybrid, None, skip_tokenizer_init=True, max_model_len=512) as llm:
        vllm_config = llm.llm_engine.vllm_config
        name, layer = next(iter(get_layers_from_vllm_config(vllm_config, Attention).items()))
        spec = layer.get_kv_cache_spec(vllm_config)
        assert type(spec).__name__ == "SlidingWindowSpec"
        with pytest.raises(ValueError, match="CPU_ATTN cannot read pages that lie one after"):
            check_foreign(name, layer, spec)
        layer.attn_backend = compat.cpu_backend()
        check_foreign(name, layer, spec)
        with pytest.raises(NotImplementedError, match="of a draft model with a SlidingWindowSpec"):
            check_foreign(f"draft_model.{name}", layer, spec)
        with pytest.raises(NotImplementedError, match=f"layer {name} with a NoneType"):
            check_foreign(name, layer, None)
        layer.kv_sharing_target_layer_name = "model.layers.0.self_attn.attn"
        with pytest.raises(NotImplementedError, match="shares another layer's KV cache"):
            check_foreign(name, layer, spec)


@pytest.mark.engine
def test_a_pool_without_room_for_a_window_is_vllms_error(hybrid: Path) -> None:
    """Sliding windows that do not fit beside the pools: one line that names the memory."""
    with (
        pytest.raises(ValueError, match="KV cache"),
        engine(
            hybrid,
            {"window": 64},
            skip_tokenizer_init=True,
            max_model_len=1024,
            num_gpu_blocks_override=8,
        ),
    ):
        pass
