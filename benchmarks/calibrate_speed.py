"""How long the probe takes, and what share of that is scoring the heads.

    python benchmarks/calibrate_speed.py                 an 8B-shaped Llama, 10,001 tokens, on CUDA
    python benchmarks/calibrate_speed.py --device cpu --layers 2 --hidden 64 --intermediate 128 \
        --heads 4 --kv-heads 2 --vocab 512 --period 50   small, on a CPU

Weights are random: the time does not depend on them. The model is made on the device, so no
weights are read. The first round, which compiles the kernel, is reported separately.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from razor_kernels.scores import COPIES
from razor_vllm.heads.calibrate import ATTENTION, Layer, Probe, probe_ids, run_probe


class Round(NamedTuple):
    """One sequence through the model.

    seconds: in all. score_seconds: the part that is scoring. peak_bytes: of the device's memory,
    0 on a CPU.
    """

    seconds: float
    score_seconds: float
    peak_bytes: int

    @property
    def share(self) -> float:
        return self.score_seconds / self.seconds


class TimedProbe(Probe):
    """A probe that measures its scoring; it waits for each layer's scores."""

    score_seconds = 0.0

    def score(self, query: torch.Tensor, *args: Any) -> Layer:
        before = now(query.device)
        layer = super().score(query, *args)
        self.score_seconds += now(query.device) - before
        return layer


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_llama(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama with random weights, made on the device."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION, dtype=dtype
        ).eval()


def measure(model: PreTrainedModel, probe: TimedProbe, ids: torch.Tensor) -> Round:
    """Time one sequence."""
    device = model.device
    probe.score_seconds = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = now(device)
    run_probe(model, probe, ids)
    seconds = now(device) - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Round(seconds, probe.score_seconds, peak)


def run(config: LlamaConfig, period: int, rounds: int, device: torch.device) -> list[Round]:
    """The first round, and `rounds` more."""
    length = 1 + COPIES * period
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tqdm(total=config.num_hidden_layers * (1 + rounds), unit="layer") as progress:
        probe = TimedProbe(config.num_hidden_layers, length, period, progress)
        AttentionInterface.register(ATTENTION, probe.attend)
        model = random_llama(config, device, dtype)
        ids = [probe_ids(range(config.vocab_size), 1, period, seed) for seed in range(1 + rounds)]
        return [measure(model, probe, tokens) for tokens in ids]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--period", type=int, default=2500, help="a quarter of the tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures to a JSON file")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --device cpu with a small shape runs without")
    if args.rounds < 1 or args.period < 2:
        parser.error("--rounds is 1 at least, --period 2")
    return args


def main() -> None:
    args = parse()
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=1 + COPIES * args.period,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    device = torch.device(args.device)
    first, *rounds = run(config, args.period, args.rounds, device)
    seconds = statistics.median(r.seconds for r in rounds)
    share = statistics.median(r.share for r in rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{1 + COPIES * args.period:,} tokens, {args.layers} layers of {args.heads} heads on {name}"
    )
    print(f"first round {first.seconds:.2f} s; median of {len(rounds)} more {seconds:.2f} s")
    print(f"scoring {share:.1%} of that; peak memory {rounds[0].peak_bytes / 1024**3:.1f} GiB")
    if args.output:
        figures = {
            "command": shlex.join(["python", *sys.argv]),
            "device": name,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "seconds": seconds,
            "score_share": share,
            "first": first._asdict(),
            "rounds": [r._asdict() for r in rounds],
        }
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
