"""With a vLLM that the plugin is not made for: as without it, and the policy refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, logging, sys
lines = []
class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("vllm.razor").addHandler(Kept())

import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor

OWNERS = (EngineCore, KVCacheManager, InputProcessor, SamplingParams)
before = [dict(vars(owner)) for owner in OWNERS]
def backends():
    found = []
    for name in ("CPU_ATTN", "CUSTOM"):
        try:
            found.append(AttentionBackendEnum[name].get_path(False))
        except ValueError:
            found.append(None)
    return found

paths = backends()
model, fault = sys.argv[1:]
exec(fault)
from vllm.plugins import load_general_plugins
load_general_plugins()

def refusal(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None

def parsed(*flags):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *flags]))

def made(config, *flags):
    args = parsed("--max-model-len", "1024", *flags)
    args.additional_config = config
    return args.create_engine_config()

print("RESULT " + json.dumps({
    "untouched": before == [dict(vars(owner)) for owner in OWNERS]
    and paths == backends(),
    "lines": lines,
    "plain": refusal(lambda: made({})),
    "full": refusal(
        lambda: parsed(
            "--max-model-len", "1024", "--kv-policy", "full",
            "--additional-config", '{"razor": {"window": 64}}',
        ).create_engine_config()
    ),
    "flag": refusal(lambda: parsed("--kv-policy", "razor", "--razor-window", "64")),
    "config": refusal(lambda: made({"razor": {"window": 64}})),
}))
"""


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("vllm.__version__ = '0.99.0'", "found 0.99.0"),
        ("vllm.__version__ = 'our own'", "found our own"),
        (
            "del EngineCore._initialize_kv_caches; before[0].pop('_initialize_kv_caches')",
            "has no _initialize",
        ),
        ("sys.modules['vllm.v1.core.kv_cache_utils'] = None", "kv_cache_utils"),
    ],
    ids=["untested series", "no version at all", "a name is gone", "a module is gone"],
)
def test_the_plugin_stands_aside(model_dir: Path, fault: str, found: str) -> None:
    """One line is logged, nothing of vLLM's engine is touched, only the policy is refused."""
    command = [sys.executable, "-c", SCRIPT, str(model_dir), fault]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (done.stdout + done.stderr)[-3000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert result["untouched"]
    assert len(result["lines"]) == 1
    assert "stands aside" in result["lines"][0]
    assert found in result["lines"][0]
    assert result["plain"] is None
    assert result["full"] is None
    for refused in (result["flag"], result["config"]):
        assert "--kv-policy razor cannot be served here" in refused
        assert found in refused


def test_a_tested_series_is_installed(model_dir: Path) -> None:
    """The same script with no fault: the policy is taken, and an engine's start is watched."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model_dir), "pass"], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (done.stdout + done.stderr)[-3000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert not result["lines"]
    assert not result["untouched"]
    assert all(result[name] is None for name in ("plain", "full", "flag", "config"))
