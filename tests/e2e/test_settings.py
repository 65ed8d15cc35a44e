"""What is settled at start-up stays: lengths, pages and files may change later."""

from pathlib import Path

import pytest
from engines import MAX_LEN, SOME_HEADS, answers, engine, manager_of, profile_file, prompts

pytestmark = pytest.mark.engine

NEEDLE = Path(__file__).parents[2] / "models" / "needle" / "weights"


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_a_length_that_vllm_shrinks_to_fit(prefill: str) -> None:
    """`--max-model-len auto`: vLLM asks for the pools at one length and serves at another."""
    lengths, tokens = [700, 3000, 5000, 8000], 4
    razor = {"window": 128, "prefill": prefill}
    options = {"kv_cache_memory_bytes": 50_000_000, "max_num_batched_tokens": 2048}
    with engine(NEEDLE, razor, max_model_len=-1, **options) as llm:
        model = llm.llm_engine.vllm_config.model_config
        fitted, longest = model.max_model_len, model.hf_text_config.max_position_embeddings
        found = answers(llm, prompts(lengths), tokens)
        pool = manager_of(llm).block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    if prefill == "exact":
        assert 8000 < fitted < longest
    with engine(NEEDLE, razor, max_model_len=8192, **options) as llm:
        assert answers(llm, prompts(lengths), tokens) == found


def test_the_full_policys_bytes_are_stocks(model_dir: Path) -> None:
    """`--block-size 128`: what the policy is compared with is what stock vLLM would hold."""
    from razor_vllm.report import plan_of

    held = {}
    for num_tokens in (1, 33, 129):
        for razor in (None, {"window": 64}):
            if razor is not None and held.get("plan"):
                continue
            with engine(model_dir, razor, block_size=128, max_model_len=512) as llm:
                if razor is not None:
                    vllm_config = llm.llm_engine.vllm_config
                    held["plan"] = plan_of(vllm_config, manager_of(llm).kv_cache_config)
                    continue
                config = manager_of(llm).kv_cache_config
                (group,) = config.kv_cache_groups
                pages = -(-num_tokens // group.kv_cache_spec.block_size)
                layers = len(group.layer_names)
                held[num_tokens] = pages * group.kv_cache_spec.page_size_bytes * layers
    for num_tokens in (1, 33, 129):
        assert held["plan"].full_request_bytes(num_tokens) == held[num_tokens]


def test_the_profile_is_read_once(model_dir: Path, tmp_path: Path) -> None:
    """Once an engine has started, its profile's file may go, or become another's."""
    path = Path(profile_file(tmp_path, SOME_HEADS))
    razor = {"head_profile": str(path), "window": 32}
    with engine(model_dir, razor) as llm:
        before = answers(llm, prompts([100]))
    with engine(model_dir, razor) as llm:
        path.write_text("{")
        assert answers(llm, prompts([100])) == before
        figures = llm.llm_engine.engine_core.engine_core.razor_memory()
        assert figures["requests_by_policy"] == {"full": 0, "razor": 1}


def test_an_engines_options_are_its_own(model_dir: Path, tmp_path: Path) -> None:
    """A caller's dict of options is left as it is, and serves another engine."""
    razor = {"head_profile": profile_file(tmp_path, SOME_HEADS), "window": 32}
    additional = {"razor": dict(razor)}
    with engine(model_dir, additional_config=additional, max_model_len=MAX_LEN) as llm:
        assert llm.llm_engine.vllm_config.additional_config is not additional
    assert additional == {"razor": razor}
