"""The `razor` command.

razor serve MODEL [vLLM options]    vllm serve MODEL --kv-policy razor [vLLM options]
razor cpu-setup                     put right what the CPU wheel of vLLM installs
"""

import argparse
import shlex
import sys

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


def main() -> None:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(prog="razor", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve", help="serve a model under the razor policy; takes all of vLLM's options"
    )
    serve.add_argument("model", help="folder or hub name of the model")
    commands.add_parser("cpu-setup", help="put right what the CPU wheel of vLLM installs")
    args, options = parser.parse_known_args()
    if args.command == "serve":
        _serve(args.model, options)
    elif options:
        parser.error(f"unknown options {' '.join(options)}")
    else:
        cpu_setup.main()


if __name__ == "__main__":
    main()
