"""The `razor` command.

razor serve MODEL [vLLM options]    vllm serve MODEL --kv-policy razor [vLLM options]
razor calibrate MODEL               find the retrieval heads, write razor_profile.json
razor show PROFILE                  heads in the terminal and as a picture
razor plan PROFILE                  slots and memory under tensor and pipeline parallelism
razor convert PATTERN --model M     a published pattern into a profile, or back
razor cpu-setup                     put right what the CPU wheel of vLLM installs
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from razor_serving import cpu_setup
from razor_vllm.config import PrefillMode

if TYPE_CHECKING:
    from razor_vllm.heads.attribution import AttributionOptions
    from razor_vllm.heads.calibrate import ProbeOptions

_DRAIN_SECONDS = 30
"""Time that requests in flight get at SIGTERM."""
_DTYPES = ["bfloat16", "float16", "float32"]
_COUNTS = {
    "api-server-count": "-asc",
    "data-parallel-size": "-dp",
    "data-parallel-size-local": "-dpl",
    "data-parallel-rank": "-dpn",
    "data-parallel-start-rank": "-dpr",
}
_BALANCERS = {
    "data-parallel-multi-port-external-lb": "-dpm",
    "data-parallel-external-lb": "-dpe",
    "data-parallel-hybrid-lb": "-dph",
}


def _request_to_copy(host: str, port: int, model: str) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"curl -s http://{host}:{port}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def _serve(model: str, options: list[str]) -> None:
    from vllm.entrypoints.cli.main import main as vllm_main

    from razor_vllm.endpoints import turn_on_endpoints

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default=model)
    parser.add_argument("--kv-policy")
    parser.add_argument("--shutdown-timeout", "--shutdown_timeout", type=int)
    _add_counts(parser)
    known, _ = parser.parse_known_args(options)
    policy = [] if known.kv_policy else ["--kv-policy", "razor"]
    shown = "127.0.0.1" if known.host in ("0.0.0.0", "::") else known.host
    print(
        f"Starting on http://{shown}:{known.port}/v1 . Once it says 'Application startup "
        f"complete', try:\n\n  {_request_to_copy(shown, known.port, known.served_model_name)}\n",
        flush=True,
    )
    network = [] if "--host" in options else ["--host", known.host]
    drain = _drain(known.shutdown_timeout, _num_api_servers(known))
    # If VLLM_PLUGINS names only other plugins, vLLM would not know our flags.
    turn_on_endpoints()
    sys.argv = ["vllm", "serve", model, *policy, *network, *drain, *options]
    vllm_main()
    from razor_serving import endpoints

    if endpoints.engine_died():
        print("razor: the engine ended by itself; the log above says why", file=sys.stderr)
        sys.exit(1)


def _add_counts(parser: argparse.ArgumentParser) -> None:
    """vLLM's options that decide how many API servers it starts."""
    for name, short in _COUNTS.items():
        parser.add_argument(f"--{name}", "--" + name.replace("-", "_"), short, type=int)
    for name, short in _BALANCERS.items():
        long_names = (f"--{name}", "--" + name.replace("-", "_"))
        parser.add_argument(*long_names, short, action="store_true")


def _num_api_servers(known: argparse.Namespace) -> int:
    """How many API servers vLLM will start (`ServeSubcommand.cmd`)."""
    if known.api_server_count is not None:
        return known.api_server_count
    if (
        known.data_parallel_multi_port_external_lb
        or known.data_parallel_external_lb
        or known.data_parallel_rank is not None
    ):
        return 1
    if known.data_parallel_hybrid_lb or known.data_parallel_start_rank is not None:
        return known.data_parallel_size_local or 1
    return known.data_parallel_size or 1


def _drain(asked: int | None, num_api_servers: int) -> list[str]:
    """Options that give requests in flight at SIGTERM some time: by default vLLM drops them.

    Several API servers let go of the engine at SIGTERM, whatever the time. Their streams hang
    until it is over and then break, and new requests hang with them.
    """
    if num_api_servers <= 1:
        return [] if asked is not None else ["--shutdown-timeout", str(_DRAIN_SECONDS)]
    if asked is None:
        what = "they end at once; --shutdown-timeout stays 0"
    else:
        what = f"under --shutdown-timeout {asked} they hang for {asked} s, and break then"
    if asked != 0:
        print(
            f"razor: with {num_api_servers} API servers, requests in flight at SIGTERM are lost: "
            f"{what}",
            flush=True,
        )
    return []


def _calibrate(args: argparse.Namespace) -> None:
    """Run the methods, or bound an ALiBi model's heads, and write the profile."""
    from razor_vllm.heads.alibi import BoundOptions
    from razor_vllm.heads.calibrate import calibrate, joined
    from razor_vllm.heads.mass import curve_text, kept_mass
    from razor_vllm.heads.profile import FILE_NAME, cache_path, write_profile

    is_folder = Path(args.model).is_dir()
    default = Path(args.model) / FILE_NAME if is_folder else cache_path(args.model, args.revision)
    output = _writable(args.output or default, args.force, make_folder=not args.output)
    methods = _methods(args)
    bound = BoundOptions(**_given(args, ("window", "epsilon")))
    profile = joined(
        [
            calibrate(args.model, options, args.device_map, args.dtype, bound, args.revision)
            for options in methods
        ]
    )
    write_profile(profile, output)
    print(f"{output}: {profile.num_retrieval_heads} of {profile.num_heads} KV heads retrieve")
    if "reach" in profile.scores:
        print(f"ALiBi: they may see further than {bound.window:,} tokens; the others cannot")
        return
    if profile.other_layers:
        layers = ", ".join(map(str, profile.other_layers))
        print(f"left out, for they have no full attention: layers {layers}")
    for name in profile.scores if profile.num_retrieval_heads else ():
        mass = kept_mass(profile, name)[profile.num_retrieval_heads - 1]
        print(f"as many of the best heads by {name} hold {mass:.0%} of its scores")
    if profile.num_kv_heads <= 2:
        print(f"{profile.num_kv_heads} KV heads a layer: there may be little to win")
    overlap = profile.made_by["stability"]
    print(f"choices of {len(args.seeds)} seeds overlap by {overlap:.0%}")
    if "attribution" in profile.scores:
        print(curve_text(profile, "attribution"))


_METHOD_OPTIONS = {
    "probe": ("induction", "echo", "period"),
    "attribution": ("share", "count", "mass", "text", "length", "window", "sinks", "prompts"),
}
"""Options of `razor calibrate` that belong to a method; None where they were not given."""


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _methods(args: argparse.Namespace) -> list["ProbeOptions | AttributionOptions"]:
    """Options of the methods that were asked for, in order.

    Raises:
        ValueError: an option of a method that is not run.
    """
    from razor_vllm.heads.attribution import AttributionOptions
    from razor_vllm.heads.calibrate import ProbeOptions, default_method

    made: dict[str, type[ProbeOptions | AttributionOptions]]
    made = {"probe": ProbeOptions, "attribution": AttributionOptions}
    # An ALiBi model's bound has a window too.
    given = {m: _given(args, set(names) - {"window"}) for m, names in _METHOD_OPTIONS.items()}
    methods = args.method or [m for m in made if given[m]][:1]
    methods = methods or [default_method(args.model, args.revision)]
    for method in made.keys() - set(methods):
        for name in given[method]:
            raise ValueError(f"--{name} belongs to --method {method}, which is not asked for")
    return [
        made[method](**_given(args, _METHOD_OPTIONS[method]), seeds=tuple(args.seeds))
        for method in dict.fromkeys(methods)
    ]


def _choose(args: argparse.Namespace) -> None:
    """Other heads by a profile's scores, into another profile."""
    from razor_vllm.heads.calibrate import rechosen
    from razor_vllm.heads.profile import read_profile, write_profile

    output = _writable(args.output, args.force)
    old = read_profile(args.profile)
    profile = rechosen(old, _options_to_choose(args))
    write_profile(profile, output)
    print(
        f"{output}: {profile.num_retrieval_heads} of {profile.num_heads} KV heads retrieve "
        f"({old.num_retrieval_heads} in {args.profile})"
    )


def _options_to_choose(args: argparse.Namespace) -> "ProbeOptions | AttributionOptions":
    """The rule of `razor choose`, with the method that it belongs to.

    Raises:
        ValueError: no rule, or one of each method.
    """
    from razor_vllm.heads.attribution import AttributionOptions
    from razor_vllm.heads.calibrate import ProbeOptions

    by_probe = _given(args, ("induction", "echo"))
    by_attribution = _given(args, ("share", "count", "mass"))
    if bool(by_probe) == bool(by_attribution):
        raise ValueError("choose by --share, --count or --mass, or by --induction and --echo")
    return ProbeOptions(**by_probe) if by_probe else AttributionOptions(**by_attribution)


def _show(args: argparse.Namespace) -> None:
    """Print a profile's heads, and draw them where asked to."""
    from razor_vllm.heads.profile import read_profile
    from razor_vllm.show import draw, text

    picture = None if args.png is None else _writable(args.png, args.force)
    profile = read_profile(args.profile)
    print(text(profile, args.window, args.lengths))
    if picture is not None:
        draw(profile, picture)
        print(f"drawn: {picture}")


def _plan(args: argparse.Namespace) -> None:
    """Print a profile's slots and memory over ranks."""
    import torch

    from razor_vllm.config import RazorConfig
    from razor_vllm.heads.profile import read_profile
    from razor_vllm.heads.shapes import shape_of
    from razor_vllm.other_layers import other_layers
    from razor_vllm.show import plan_text

    config = RazorConfig(
        window=args.window,
        window_ratio=args.window_ratio,
        sinks=args.sinks,
        prefill=args.prefill,
        allow_no_retrieval_heads=True,
    )
    config.check_lengths(args.max_model_len)
    profile, dtype = read_profile(args.profile), getattr(torch, args.dtype)
    foreign: tuple[Any, ...] = ()
    if args.model is not None:
        model = _text_config(args.model)
        shape = shape_of(model)
        profile.check_model(
            shape.num_layers, shape.num_kv_heads, shape.head_size, profile.full_layers
        )
        foreign = other_layers(model, args.tp, dtype)
    elif profile.other_layers:
        raise ValueError(
            f"{args.profile}: {len(profile.other_layers)} of {profile.num_layers} layers have no "
            "full attention; --model tells what they hold"
        )
    print(
        plan_text(
            profile,
            config,
            args.tp,
            args.pp,
            args.max_model_len,
            _kv_bytes(args.kv_memory),
            dtype,
            foreign,
        )
    )


def _convert(args: argparse.Namespace) -> None:
    """Read a published pattern and write a profile, or the other way round."""
    from razor_vllm.heads.convert import Selection, convert, write_duo
    from razor_vllm.heads.profile import FILE_NAME, read_profile, write_profile
    from razor_vllm.heads.shapes import shape_of

    if args.to_duo is not None:
        if not args.to_duo.is_dir():
            raise ValueError(f"{args.to_duo} is not a folder")
        for name in ("full_attention_heads.tsv", "config.json"):
            _writable(args.to_duo / name, args.force)
        write_duo(read_profile(args.pattern), args.to_duo, args.sinks, args.window)
        print(f"{args.to_duo}: DuoAttention's form")
        return
    if args.model is None:
        raise ValueError("--model is needed: a pattern does not say its model's shape")
    output = _writable(args.output or Path(FILE_NAME), args.force)
    shape = shape_of(_text_config(args.model))
    profile = convert(args.pattern, shape, Selection(args.share, args.threshold))
    write_profile(profile, output)
    print(f"{output}: {profile.num_retrieval_heads} of {profile.num_heads} KV heads retrieve")
    sizes = profile.made_by.get("made_for", {})
    if sizes:
        flags = " ".join(f"--razor-{name} {value}" for name, value in sizes.items())
        print(f"made for {flags}")


def _text_config(model: str) -> Any:
    """The configuration of a model's text part; no weights are read."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config()


def _kv_bytes(gibibytes: float) -> int:
    if not 0 < gibibytes < math.inf:
        raise ValueError(f"kv-memory is {gibibytes}; accepted are numbers of GiB above 0")
    return int(gibibytes * 1024**3)


def _writable(path: Path, force: bool, make_folder: bool = False) -> Path:
    """The path, if it may be written; with `make_folder` its folder need not exist yet.

    Raises:
        ValueError: it is a folder, exists and is not to be overwritten, or its own folder does
            not exist or may not be written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is needed")
    if path.exists() and not force:
        raise ValueError(f"{path} exists; --force overwrites it")
    if not make_folder and not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} may not be written to")
    return path


def _fail(message: str) -> NoReturn:
    print(f"razor: {message}", file=sys.stderr)
    sys.exit(2)


def _add_rules(
    parser: argparse.ArgumentParser,
) -> tuple[argparse._ArgumentGroup, argparse._ArgumentGroup]:
    """Options that say how many heads are chosen, in a group for each method."""
    probe = parser.add_argument_group("probe")
    probe.add_argument("--induction", type=float, help="share of KV heads by score; 0.14")
    probe.add_argument("--echo", type=float, help="share of KV heads, on top; 0.01")
    gates = parser.add_argument_group("attribution")
    gates.add_argument("--share", type=float, help="share of KV heads that are chosen")
    gates.add_argument("--count", type=int, help="or their number")
    gates.add_argument("--mass", type=float, help="or the share of the score that they hold; 0.98")
    return probe, gates


def main() -> None:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(prog="razor", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve", help="serve a model under the razor policy; takes all of vLLM's options"
    )
    serve.add_argument("model", help="folder or hub name of the model")
    find = commands.add_parser("calibrate", help="find the retrieval heads of a model")
    find.add_argument("model", help="folder or hub name of the model")
    find.add_argument("--revision", help="branch, tag or commit of a hub model")
    find.add_argument("--output", type=Path, help="default: beside the weights, or the cache")
    find.add_argument("--force", action="store_true", help="overwrite the output")
    find.add_argument(
        "--method",
        nargs="+",
        choices=list(_METHOD_OPTIONS),
        help="of several, the last one chooses, and the profile has the scores of all; by default "
        "that of the options given, else attribution, or the probe where it alone can be run",
    )
    probe, gates = _add_rules(find)
    probe.add_argument("--period", type=int, help="random tokens that are repeated; 2500")
    gates.add_argument("--text", type=Path, help="text that prompts are made from; one of ours")
    gates.add_argument("--length", type=int, help="tokens of a prompt; 1024")
    gates.add_argument("--sinks", type=int, help="first tokens that local heads keep; 4")
    gates.add_argument("--prompts", type=int, help="sets of three prompts, a seed; 1")
    find.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    find.add_argument(
        "--device-map",
        help="cpu, cuda, or auto: over all GPUs, then memory, then disk; by default auto, or the "
        "CPU where there is no GPU",
    )
    find.add_argument("--dtype", choices=["auto", *_DTYPES], default="auto")
    find.add_argument(
        "--window",
        type=int,
        help="of attribution: tokens that local heads keep, 128; of an ALiBi model: heads that may "
        "see further retrieve, 4096",
    )
    find.add_argument(
        "--epsilon", type=float, help="of an ALiBi model: attention weight that is nothing; 0.001"
    )
    pick = commands.add_parser("choose", help="other heads by a profile's scores, without a run")
    pick.add_argument("profile", type=Path)
    pick.add_argument("--output", type=Path, required=True)
    pick.add_argument("--force", action="store_true", help="overwrite the output")
    _add_rules(pick)
    show = commands.add_parser("show", help="show which heads of a profile retrieve")
    show.add_argument("profile", type=Path)
    show.add_argument("--png", type=Path, help="draw scores and choice to this file")
    show.add_argument("--window", type=int, default=4096)
    show.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 131072])
    show.add_argument("--force", action="store_true", help="overwrite the picture")
    plan = commands.add_parser("plan", help="slots and memory over ranks")
    plan.add_argument("profile", type=Path)
    plan.add_argument("--model", help="folder or hub name, for layers without full attention")
    plan.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    plan.add_argument("--pp", type=int, default=1, help="pipeline stages")
    plan.add_argument("--max-model-len", type=int, default=131072, help="tokens of a request")
    plan.add_argument("--kv-memory", type=float, required=True, help="GiB a rank")
    plan.add_argument("--window", type=int, default=4096)
    plan.add_argument("--window-ratio", type=float, default=0.0)
    plan.add_argument("--sinks", type=int, default=4)
    plan.add_argument("--prefill", choices=get_args(PrefillMode), default="exact")
    plan.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    convert = commands.add_parser("convert", help="read or write others' head patterns")
    convert.add_argument("pattern", type=Path, help="a pattern; with --to-duo, a profile")
    convert.add_argument("--model", help="folder or hub name of the model")
    convert.add_argument("--share", type=float, help="share of KV heads, from gates or a ranking")
    convert.add_argument("--threshold", type=float, help="least gate")
    convert.add_argument("--output", type=Path, help="default: razor_profile.json here")
    convert.add_argument("--to-duo", type=Path, help="folder for DuoAttention's form")
    convert.add_argument("--sinks", type=int, default=4, help="of --to-duo")
    convert.add_argument("--window", type=int, default=4096, help="of --to-duo")
    convert.add_argument("--force", action="store_true", help="overwrite the output")
    commands.add_parser("cpu-setup", help="put right what the CPU wheel of vLLM installs")
    args, options = parser.parse_known_args()
    if args.command == "serve":
        _serve(args.model, options)
        return
    if options:
        parser.error(f"unknown options {' '.join(options)}")
    if args.command == "cpu-setup":
        cpu_setup.main()
        return
    commands_run = {
        "calibrate": _calibrate,
        "choose": _choose,
        "show": _show,
        "plan": _plan,
        "convert": _convert,
    }
    try:
        commands_run[args.command](args)
    except (ValueError, NotImplementedError, OSError) as error:
        # Bad input: one line, exit status 2, nothing written.
        _fail(str(error).splitlines()[0].removeprefix("razor: "))


if __name__ == "__main__":
    main()
