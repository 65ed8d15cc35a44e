"""The model under test, however it is served: an engine in this process, or a URL.

Both answer the same few calls: how many tokens a chat has, the replies to a batch of
chats, and what the KV cache held. An engine runs one set of razor options; a server
runs its own, and the caller can choose only the per-request opt-out.
"""

import contextlib
import gc
import json
import os
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

Chat = list[dict[str, str]]

MODEL_URL_TIMEOUT = 600


class HeldBytes(NamedTuple):
    """KV bytes that one request held in the block pool: most of all, and in its last step."""

    peak: int
    decode: int


class ServedModel(Protocol):
    """What the benchmarks need from a model."""

    def num_tokens(self, chat: Chat) -> int:
        """Tokens of a chat's prompt."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without special ones."""

    def reply(
        self, chats: Sequence[Chat], max_tokens: int, policy: str, done: Callable[[], None]
    ) -> list[str]:
        """Greedy replies, in order; `done` is called as each one ends.

        Args:
            policy: razor for the engine's own options, full for the opt-out.
        """

    def held_bytes(self, chat: Chat, max_tokens: int, policy: str) -> HeldBytes | None:
        """What the chat's reply held of the KV cache; None if it is not known."""

    def describe(self) -> dict[str, Any]:
        """Model, dtype and version, for the results file."""


def request_args(policy: str) -> dict[str, str] | None:
    """`extra_args` (engine) or `vllm_xargs` (server) of a request under a policy."""
    return {"kv_policy": "full"} if policy == "full" else None


class EngineModel:
    """A `vllm.LLM` in this process; see `open_engine`.

    Args:
        completion: whether chats are given as plain text although there is a template.
    """

    def __init__(self, llm: Any, completion: bool = False) -> None:
        self.llm = llm
        self.tokenizer = llm.get_tokenizer()
        self.completion = completion
        self._next_id = 0

    def token_ids(self, chat: Chat) -> list[int]:
        """Prompt of a chat, by the model's chat template, or plain where it has none.

        A last message of the assistant is the beginning of the reply.
        """
        if self.completion:
            return self.tokenizer.encode(joined(chat))
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(plain_prompt(chat))
        return self.tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=False, **ending(chat)
        )

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def num_tokens(self, chat: Chat) -> int:
        return len(self.token_ids(chat))

    def reply(
        self, chats: Sequence[Chat], max_tokens: int, policy: str, done: Callable[[], None]
    ) -> list[str]:
        names = [self._submit(chat, max_tokens, policy) for chat in chats]
        texts: dict[str, str] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                if output.finished:
                    texts[output.request_id] = output.outputs[0].text
                    done()
        return [texts[name] for name in names]

    def held_bytes(self, chat: Chat, max_tokens: int, policy: str) -> HeldBytes:
        core = self.llm.llm_engine.engine_core.engine_core
        manager = core.scheduler.kv_cache_manager
        config, pool = manager.kv_cache_config, manager.block_pool
        # Groups of layers whose tensors begin at one offset share the bytes there.
        pools = {tensor.offset: tensor.size for tensor in config.kv_cache_tensors}
        block_bytes = sum(pools.values()) // config.num_blocks
        held = []
        # The chat was asked before; a cached prompt would hide what reading it holds.
        self.llm.reset_prefix_cache()
        # An answer of one token would be gone before anyone could look.
        self._submit(chat, max_tokens, policy, ignore_eos=True)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
            # One block of the pool is vLLM's null block, and never free.
            held.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        # The blocks of a finished request are free again.
        in_use = [blocks for blocks in held if blocks]
        return HeldBytes(max(in_use) * block_bytes, in_use[-1] * block_bytes)

    def describe(self) -> dict[str, Any]:
        import vllm

        config = self.llm.llm_engine.vllm_config
        return {
            "model": config.model_config.model,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "max_model_len": config.model_config.max_model_len,
            "vllm": vllm.__version__,
        }

    def _submit(self, chat: Chat, max_tokens: int, policy: str, ignore_eos: bool = False) -> str:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            extra_args=request_args(policy),
        )
        self._next_id += 1
        name = str(self._next_id)
        prompt = {"prompt_token_ids": self.token_ids(chat)}
        self.llm.llm_engine.add_request(name, prompt, params)
        return name


def set_environment() -> None:
    """Prepare for an engine in this process; to be called before vLLM is imported."""
    # The block pool can only be read in its own process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextlib.contextmanager
def open_engine(
    model: str, razor: dict[str, Any] | None, completion: bool = False, **options: Any
) -> Iterator[EngineModel]:
    """An engine in this process; stock vLLM where `razor` is None.

    Args:
        razor: options of `additional_config["razor"]`.
        completion: of the `EngineModel`.
        options: of `vllm.LLM`.
    """
    set_environment()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if razor is not None:
        options["additional_config"] = {"razor": razor}
    llm = LLM(model, **{"disable_log_stats": True, **options})
    try:
        yield EngineModel(llm, completion)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


class ServerModel:
    """An OpenAI-compatible server.

    Args:
        url: up to and with `/v1`.
        model: the name that the server knows it by; its first one where None.
        completion: whether chats are given as plain text although there is a template.
    """

    def __init__(
        self, url: str, model: str | None, concurrency: int = 4, completion: bool = False
    ) -> None:
        self.url = url.rstrip("/")
        self.completion = completion
        self.model = model or self._get("/models")["data"][0]["id"]
        self.concurrency = concurrency

    def num_tokens(self, chat: Chat) -> int:
        return self._chat(chat, 1, "full")["usage"]["prompt_tokens"]

    def count_tokens(self, text: str) -> int:
        base = self.url.removesuffix("/v1")
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return self._post("/tokenize", body, base)["count"]

    def reply(
        self, chats: Sequence[Chat], max_tokens: int, policy: str, done: Callable[[], None]
    ) -> list[str]:
        def one(chat: Chat) -> str:
            if self.completion:
                options = {"max_tokens": max_tokens, "temperature": 0, **xargs(policy)}
                text = self.complete(joined(chat), **options)["choices"][0]["text"]
            else:
                text = self._chat(chat, max_tokens, policy)["choices"][0]["message"]["content"]
            done()
            return text or ""

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, chats))

    def held_bytes(self, chat: Chat, max_tokens: int, policy: str) -> None:
        """A server does not report what one request holds."""

    def describe(self) -> dict[str, Any]:
        base = self.url.removesuffix("/v1")
        with contextlib.suppress(OSError, ValueError):
            return {
                "url": self.url,
                "model": self.model,
                "vllm": self._read(urllib.request.Request(f"{base}/version"))["version"],
            }
        return {"url": self.url, "model": self.model}

    def complete(self, prompt: str, **options: Any) -> dict[str, Any]:
        """`/completions` of a text."""
        return self._post("/completions", {"prompt": prompt, "model": self.model, **options})

    def _chat(self, chat: Chat, max_tokens: int, policy: str) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": chat,
            "max_tokens": max_tokens,
            "temperature": 0,
            **ending(chat),
            **xargs(policy),
        }
        return self._post("/chat/completions", body)

    def _get(self, path: str) -> dict[str, Any]:
        return self._read(urllib.request.Request(self.url + path))

    def _post(self, path: str, body: dict[str, Any], base: str | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode()
        return self._read(urllib.request.Request((base or self.url) + path, data, headers))

    def _read(self, request: urllib.request.Request) -> dict[str, Any]:
        with urllib.request.urlopen(request, timeout=MODEL_URL_TIMEOUT) as response:
            return json.load(response)


def xargs(policy: str) -> dict[str, Any]:
    """A server's request under a policy."""
    args = request_args(policy)
    return {"vllm_xargs": args} if args else {}


def ending(chat: Chat) -> dict[str, bool]:
    """How a chat template ends a prompt: a last message of the assistant is continued."""
    begun = chat[-1]["role"] == "assistant"
    return {"add_generation_prompt": not begun, "continue_final_message": begun}


def joined(chat: Chat) -> str:
    """A chat as plain text that the model continues."""
    return "\n".join(message["content"] for message in chat)


def plain_prompt(chat: Chat) -> str:
    """A chat as plain text, for a model without a chat template."""
    lines = [
        f"Answer: {message['content']}" if message["role"] == "assistant" else message["content"]
        for message in chat
    ]
    if chat[-1]["role"] != "assistant":
        lines.append("Answer:")
    return "\n".join(lines)
