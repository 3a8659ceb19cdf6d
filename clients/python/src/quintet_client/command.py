"""The command `quintet`: asks a service, and prints a line for each answer."""

import argparse
import base64
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import stamina

from quintet_client.client import Client
from quintet_client.errors import BadInput, QuintetError
from quintet_client.results import Classification, Detection, Generated

_AT_A_TIME = 16
"""Inputs in one request: enough for the service to batch, few enough to stay under its limits."""

_WIDEST_NAME = 80

_SERVICE_FAILED = 1
_BAD_USE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for the service's failure, 2 for the caller's."""
    # The message on standard error is all that a person needs; hooks would log each retry as well.
    stamina.instrumentation.set_on_retry_hooks(())
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        client = Client(options.url, timeout=options.timeout, key=os.environ.get("QUINTET_KEY"))
    except ValueError as error:
        parser.error(str(error))
    try:
        with client:
            return _run(client, options)
    except QuintetError as error:
        print(f"quintet: {error}", file=sys.stderr)
        return _BAD_USE if isinstance(error, BadInput) else _SERVICE_FAILED
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it ends
        return 0
    except OSError as error:
        print(f"quintet: {error.filename}: {error.strerror}", file=sys.stderr)
        return _BAD_USE
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("quintet", description="Ask a Quintet service.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    shared = argparse.ArgumentParser(add_help=False)
    default_url = os.environ.get("QUINTET_URL") or "http://localhost:3000"
    shared.add_argument("--url", default=default_url, help="default: $QUINTET_URL, or http://localhost:3000")
    shared.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="default: 10")
    printed = argparse.ArgumentParser(add_help=False)
    printed.add_argument("--json", action="store_true", help="print a JSON object a line, with all there is")

    for verb, purpose in {
        "digit": "read the handwritten digit in a picture",
        "image": "name what a picture shows",
        "detection": "find blood cells in a picture",
    }.items():
        command = verbs.add_parser(verb, help=purpose, description=purpose, parents=[shared, printed])
        command.add_argument("inputs", nargs="+", metavar="PICTURE", help='a file, or "-" for standard input')
        if verb == "detection":
            command.add_argument(
                "--min-confidence", type=float, default=0.5, metavar="0..1", help="default: 0.5"
            )

    purpose = "tell whether a text is positive or negative"
    command = verbs.add_parser("sentiment", help=purpose, description=purpose, parents=[shared, printed])
    command.add_argument(
        "inputs", nargs="+", metavar="TEXT", help='a text, or "-" for standard input, a text a line'
    )

    purpose = "draw digits and save them as PNG files"
    command = verbs.add_parser("generator", help=purpose, description=purpose, parents=[shared, printed])
    command.add_argument("inputs", nargs="*", type=int, metavar="DIGIT", help="default: all ten")
    command.add_argument("--seed", type=int, metavar="NUMBER", help="draws the same pictures again")
    command.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="default: the current one"
    )

    purpose = "tell whether the service takes requests: exit status 0 or 1"
    verbs.add_parser("ready", help=purpose, description=purpose, parents=[shared])
    return parser


def _run(client: Client, options: argparse.Namespace) -> int:
    if options.verb == "ready":
        is_ready = client.is_ready()
        print("ready" if is_ready else "not ready")
        return 0 if is_ready else _SERVICE_FAILED
    for name, result in _answers(client, options):
        if isinstance(result, Generated):
            options.out.mkdir(parents=True, exist_ok=True)
            result.save(options.out / name)
            name = str(options.out / name)
        print(_as_json(name, result) if options.json else f"{_shorten(name)}: {_in_words(result)}")
    return 0


def _answers(
    client: Client, options: argparse.Namespace
) -> Iterator[tuple[str, Classification | Detection | Generated]]:
    """Each input's name, and its result.

    Raises:
        BadInput: the service refuses an input; the message names it.
    """
    if options.verb == "generator":
        for drawn in client.generator(options.inputs or None, seed=options.seed):
            yield f"{drawn.digit}-{drawn.seed}.png", drawn
        return
    inputs = _sentences(options.inputs) if options.verb == "sentiment" else options.inputs
    for start in range(0, len(inputs), _AT_A_TIME):
        names = inputs[start : start + _AT_A_TIME]
        try:
            yield from zip(names, _ask(client, options, names), strict=True)
        except BadInput as error:
            at_fault = 0 if len(names) == 1 else error.index
            if at_fault is None:
                raise
            raise BadInput(f"{_shorten(names[at_fault])}: {error}") from error


def _ask(
    client: Client, options: argparse.Namespace, names: list[str]
) -> Sequence[Classification | Detection]:
    if options.verb == "sentiment":
        return client.sentiment(names)
    pictures = [sys.stdin.buffer.read() if name == "-" else Path(name) for name in names]
    if options.verb == "detection":
        return client.detection(pictures, options.min_confidence)
    return client.digit(pictures) if options.verb == "digit" else client.image(pictures)


def _sentences(texts: list[str]) -> list[str]:
    """The texts, with those of standard input in the place of "-"."""
    sentences = []
    for text in texts:
        lines = sys.stdin.read().splitlines() if text == "-" else [text]
        sentences += [line for line in lines if line.strip() or text != "-"]
    return sentences


def _shorten(name: str) -> str:
    """A name that fits its line: texts may be long, and hold line ends."""
    name = " ".join(name.split())
    return name if len(name) <= _WIDEST_NAME else f"{name[: _WIDEST_NAME - 1]}…"


def _in_words(result: Classification | Detection | Generated) -> str:
    """A result for people, in a line."""
    if isinstance(result, Classification):
        return f"{result.label} ({result.confidence:.1%})".replace("%", " %")
    if isinstance(result, Generated):
        return f"a {result.digit}, seed {result.seed}"
    counts = Counter(found.label for found in result.objects)
    return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "nothing found"


def _as_json(name: str, result: Classification | Detection | Generated) -> str:
    """A result for programs, in a line; a picture's bytes in base64."""
    fields = {"input": name} | dataclasses.asdict(result)
    if isinstance(result, Generated):
        fields["image"] = base64.b64encode(result.image).decode()
    return json.dumps(fields, ensure_ascii=False)


if __name__ == "__main__":
    raise SystemExit(main())
