"""The `razor` command.

razor serve MODEL [vLLM options]    vllm serve MODEL --kv-policy razor [vLLM options]
razor calibrate MODEL               find the retrieval heads, write razor_profile.json
razor cpu-setup                     put right what the CPU wheel of vLLM installs
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from razor_serving import cpu_setup


def _request_to_copy(host: str, port: int, model: str) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"curl -s http://{host}:{port}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def _serve(model: str, options: list[str]) -> None:
    from vllm.entrypoints.cli.main import main as vllm_main

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default=model)
    parser.add_argument("--kv-policy")
    known, _ = parser.parse_known_args(options)
    policy = [] if known.kv_policy else ["--kv-policy", "razor"]
    shown = "127.0.0.1" if known.host in ("0.0.0.0", "::") else known.host
    print(
        f"Starting on http://{shown}:{known.port}/v1 . Once it says 'Application startup "
        f"complete', try:\n\n  {_request_to_copy(shown, known.port, known.served_model_name)}\n",
        flush=True,
    )
    network = [] if "--host" in options else ["--host", known.host]
    sys.argv = ["vllm", "serve", model, *policy, *network, *options]
    vllm_main()


def _calibrate(args: argparse.Namespace) -> None:
    """Run the probe and write the profile; bad input is one line and exit status 2."""
    from razor_vllm.profile import FILE_NAME

    output = args.output or Path(args.model) / FILE_NAME
    if args.output is None and not Path(args.model).is_dir():
        output = Path(FILE_NAME)
    if output.exists() and not args.force:
        _fail(f"{output} exists; --force overwrites it")
    if not output.parent.is_dir():
        _fail(f"{output.parent} is not a folder")
    from razor_vllm.calibrate import ProbeOptions, calibrate

    try:
        options = ProbeOptions(args.induction, args.echo, args.period, tuple(args.seeds))
        profile = calibrate(args.model, options, args.device_map, args.dtype)
    except (ValueError, NotImplementedError, OSError) as error:
        _fail(str(error).splitlines()[0])
    _write_atomically(output, profile.to_json())
    print(
        f"{output}: {profile.num_retrieval_heads} of {profile.num_heads} KV heads retrieve; "
        f"choices of {len(args.seeds)} seeds overlap by {profile.made_by['stability']:.0%}"
    )


def _fail(message: str) -> NoReturn:
    print(f"razor: {message}", file=sys.stderr)
    sys.exit(2)


def _write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


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
    find.add_argument("--output", type=Path, help="default: razor_profile.json in its folder")
    find.add_argument("--force", action="store_true", help="overwrite the output")
    find.add_argument("--induction", type=float, default=0.14, help="share of KV heads, by score")
    find.add_argument("--echo", type=float, default=0.01, help="share of KV heads, on top")
    find.add_argument("--period", type=int, default=2500, help="random tokens that are repeated")
    find.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    find.add_argument("--device-map", help="as transformers takes it: cuda, auto, ...")
    find.add_argument("--dtype", default="auto")
    commands.add_parser("cpu-setup", help="put right what the CPU wheel of vLLM installs")
    args, options = parser.parse_known_args()
    if args.command == "serve":
        _serve(args.model, options)
    elif options:
        parser.error(f"unknown options {' '.join(options)}")
    elif args.command == "calibrate":
        _calibrate(args)
    else:
        cpu_setup.main()


if __name__ == "__main__":
    main()
