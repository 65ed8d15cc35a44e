"""What the routes under /v1/razor take and answer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from razor_vllm.config import PrefillMode

MAX_MIX = 64
"""Lengths that one estimate may name."""
MAX_TOKENS = 2**24
MAX_KV_BYTES = 2**50


class Model(BaseModel):
    """Unknown fields are refused; infinity and NaN too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PolicyConfig(Model):
    """Options of the policy, as the engine runs them."""

    window: int = Field(description="Latest tokens that a local head sees as written.")
    window_ratio: float = Field(description="Least window as a share of the position.")
    sinks: int = Field(description="First tokens that a local head keeps for ever.")
    prefill: PrefillMode
    first_turn_ends_with: list[int] = Field(
        description="Tokens of the chat template, in chat mode; none where prompts are exact."
    )
    compensation: bool


class HeadSummary(Model):
    """The head profile in numbers."""

    num_layers: int
    num_kv_heads: int = Field(description="KV heads of a layer with full attention.")
    head_size: int
    num_retrieval_heads: int = Field(description="Of all layers.")
    retrieval_share: float
    made_by: dict[str, Any] = Field(description="How the heads were found.")


class RankSlots(Model):
    """Slots of one rank; a slot is one KV head of one layer."""

    rank: int
    layers: list[int]
    retrieval_slots: int
    local_slots: int
    promoted: list[tuple[int, int]] = Field(
        description="Local heads, as (layer, KV head), that took a spare retrieval slot."
    )


class PageShape(Model):
    """Pages of the block pool, of one rank."""

    bytes: int
    retrieval_tokens: int = Field(description="Tokens a page of the retrieval pool.")
    local_tokens: int = Field(description="Tokens a page of the local pool.")
    retrieval_padding: float = Field(description="Share of a retrieval page that is unused.")
    local_padding: float = Field(description="Share of a local page that is unused.")
    tables: int = Field(description="Block tables of a request.")
    hit_tokens: int = Field(description="Prefix-cache hits are a multiple of so many tokens.")


class OtherLayers(Model):
    """Layers without full attention, or of a draft, of one kind: they are not split by heads."""

    kind: str
    layers: int
    groups: int = Field(description="Block tables of a request.")
    tokens_per_page: int | None = Field(description="Null where a page holds a Mamba state.")
    layer_page_bytes: int = Field(description="Bytes of one layer in a page.")


class RequestPolicies(Model):
    """How a request opts out, or says how much of its prompt is attended as written."""

    field: str = "vllm_xargs.kv_policy"
    accepted: list[str]
    default: str = "razor"
    dense_tokens_field: str = "vllm_xargs.kv_dense_tokens"


class LengthMemory(Model):
    """Requests of one length, decoding."""

    tokens: int
    weight: float
    bytes: int
    full_policy_bytes: int
    prefill_bytes: int = Field(description="Held when the prefill ends, before compression.")
    fit: int
    fit_full_policy: int
    waiting_bytes: int = Field(
        description="Of cache that the next turn of a chat of that length needs while it waits."
    )
    fit_waiting: int = Field(description="Such chats that fit while they wait.")
    fit_waiting_full_policy: int


class Policy(Model):
    """Answer of GET /v1/razor/policy."""

    object: Literal["razor.policy"] = "razor.policy"
    policy: Literal["razor"] = "razor"
    model: str
    config: PolicyConfig
    heads: HeadSummary
    ranks: list[RankSlots]
    page: PageShape
    other_layers: list[OtherLayers] = Field(description="Empty where all have full attention.")
    kv_dtype: str
    max_model_len: int
    per_request: RequestPolicies
    longest: LengthMemory = Field(description="A request, or a chat, of the model's length.")


class Amount(Model):
    """Pages, and their bytes on one rank."""

    pages: int
    bytes: int


class PoolMemory(Model):
    """One pool."""

    name: Literal["retrieval", "local"]
    slots: int = Field(description="KV heads of all layers that the pool has room for, a rank.")
    tokens_per_page: int
    held: Amount = Field(description="In block tables of requests.")
    cached: Amount = Field(description="In the prefix cache alone; taken back when needed.")
    prefix_cache_hit_tokens: int = Field(description="Tokens taken from the prefix cache so far.")


class OtherMemory(Model):
    """All layers that are not split by heads."""

    groups: int = Field(description="Block tables of a request.")
    held: Amount
    cached: Amount


class RequestMemory(Model):
    """One request that holds pages."""

    request_id: str
    policy: Literal["full", "razor"]
    running: bool
    num_prompt_tokens: int
    num_tokens: int = Field(description="Computed so far.")
    retrieval_pages: int
    local_pages: int
    foreign_pages: int = Field(description="Of layers that are not split by heads.")
    bytes: int
    full_policy_bytes: int = Field(description="What stock vLLM would hold.")
    num_preemptions: int


class AgainstFull(Model):
    """What the requests that hold pages hold, against stock vLLM."""

    bytes: int = Field(description="Sum over requests; a shared page counts for each of them.")
    full_policy_bytes: int
    saved_bytes: int
    kept_share: float | None = Field(description="Null where no request holds a page.")
    kept_share_by_layer: list[float] = Field(
        description="Of the first rank's layers with full attention, padding left out; empty "
        "where no request holds a page."
    )


class Requests(Model):
    """Requests of one engine."""

    running: int
    waiting: int
    holding_pages: int
    by_policy: dict[str, int] = Field(description="Since the start.")
    preemptions: int = Field(description="Since the start.")
    dropped_tokens: int = Field(description="Tokens that left local heads' windows so far.")


class Integrity(Model):
    """The page accounting's check, made when the engine is idle."""

    intact: bool | None = Field(description="Null before the first check.")
    checks: int
    violations: int = Field(description="Checks that found something.")
    checked_at: float | None = Field(description="Unix time of the last check.")
    found: list[str] = Field(description="What the last check found.")


class EngineMemory(Model):
    """One engine; data-parallel servers have several."""

    engine: int
    page_bytes: int
    total: Amount
    free: Amount = Field(description="Neither held nor cached: of either pool.")
    pools: list[PoolMemory]
    other_layers: OtherMemory
    against_full: AgainstFull
    requests: Requests
    integrity: Integrity
    by_request: list[RequestMemory] | None = Field(
        description="The largest 1000, where asked for with ?requests=true."
    )


class Memory(Model):
    """Answer of GET /v1/razor/memory. Bytes are of one rank; all ranks hold the same pages."""

    object: Literal["razor.memory"] = "razor.memory"
    age_seconds: float = Field(description="Since the figures were read from the engine.")
    engines: list[EngineMemory]


class Heads(Model):
    """Answer of GET /v1/razor/heads: the map of the whole model."""

    object: Literal["razor.heads"] = "razor.heads"
    num_layers: int
    num_kv_heads: int
    other_layers: list[int] = Field(description="Layers without full attention.")
    retrieval_heads: list[list[int]] = Field(description="KV heads of each layer that retrieve.")
    scores: dict[str, list[list[float]]] = Field(description="Name to layer to KV head.")


class MixEntry(Model):
    """Requests of one length."""

    tokens: Annotated[int, Field(strict=True, ge=1, le=MAX_TOKENS)]
    weight: Annotated[float, Field(strict=True, gt=0, le=1e6)] = 1.0


class EstimateRequest(Model):
    """Body of POST /v1/razor/estimate."""

    mix: Annotated[list[MixEntry], Field(min_length=1, max_length=MAX_MIX)]
    kv_memory_bytes: Annotated[int, Field(strict=True, ge=1, le=MAX_KV_BYTES)] | None = Field(
        None, description="KV memory of one rank; the engine's own by default."
    )


class Estimate(Model):
    """Answer of POST /v1/razor/estimate. Bytes are of one rank."""

    object: Literal["razor.estimate"] = "razor.estimate"
    kv_memory_bytes: int
    mean_bytes: float
    mean_full_policy_bytes: float
    fit: int = Field(description="Decoding requests of the mix that fit at a time.")
    fit_full_policy: int
    lengths: list[LengthMemory]
