"""The command `quintet`: asks a service, and prints a line for each answer, or a table at a terminal."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import stamina

from quintet_client import pictures
from quintet_client import progress as bars
from quintet_client.client import Client
from quintet_client.errors import BadInput, QuintetError
from quintet_client.results import Classification, Detection, Generated, Status, as_dict, in_percent

_WIDEST_NAME = 80
_BAR_WIDTH = 24

_SERVICE_FAILED = 1
_BAD_USE = 2

Answer = Classification | Detection | Generated
Show = Callable[[str, Answer], None]


class _BadUse(Exception):
    """What was given cannot be used; the message is for the caller."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for the service's failure, 2 for the caller's."""
    # The message on standard error is all that a person needs; hooks would log each retry as well.
    stamina.instrumentation.set_on_retry_hooks(())
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        client = Client(
            options.url,
            timeout=options.timeout,
            outage=options.timeout,
            key=os.environ.get("QUINTET_KEY"),
            ca_file=options.ca_file,
        )
    except (ValueError, OSError) as error:
        parser.error(_sentence(error))
    try:
        with client:
            return _run(client, options)
    except QuintetError as error:
        _complain(str(error))
        return _BAD_USE if isinstance(error, BadInput) else _SERVICE_FAILED
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it ends
        return 0
    except (OSError, _BadUse) as error:
        _complain(_sentence(error))
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
    shared.add_argument(
        "--ca-file",
        default=os.environ.get("QUINTET_CA_FILE"),
        metavar="PEM",
        help="certificates to trust, for a self-signed one; default: $QUINTET_CA_FILE",
    )
    shared.add_argument("--json", action="store_true", help="print a JSON object a line, with all there is")

    for verb, purpose in {
        "digit": "read the handwritten digit in a picture",
        "image": "name what a picture shows",
        "detection": "find blood cells in a picture",
    }.items():
        command = verbs.add_parser(verb, help=purpose, description=purpose, parents=[shared])
        command.add_argument("inputs", nargs="+", metavar="PICTURE", help='a file, or "-" for standard input')
        if verb == "detection":
            command.add_argument(
                "--min-confidence", type=float, default=0.5, metavar="0..1", help="default: 0.5"
            )
            command.add_argument(
                "--save",
                type=Path,
                metavar="FILE",
                help="write the picture with its boxes; several: a folder for them",
            )

    purpose = "tell whether a text is positive or negative"
    command = verbs.add_parser("sentiment", help=purpose, description=purpose, parents=[shared])
    command.add_argument(
        "inputs",
        nargs="*",
        metavar="TEXT",
        help='a text, or "-" for standard input, a text a line, which is also what no TEXT means',
    )

    purpose = "draw digits and save them as PNG files"
    command = verbs.add_parser("generator", help=purpose, description=purpose, parents=[shared])
    command.add_argument("inputs", nargs="*", type=int, metavar="DIGIT", help="default: all ten")
    command.add_argument("--seed", type=int, metavar="NUMBER", help="draws the same pictures again")
    command.add_argument("--save", type=Path, metavar="FILE", help="write all of them in one grid instead")
    command.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="default: the current one"
    )

    purpose = "tell how the service is and what it serves: exit status 0 or 1"
    verbs.add_parser("status", help=purpose, description=purpose, parents=[shared])
    purpose = "tell whether the service takes requests: exit status 0 or 1"
    verbs.add_parser("ready", help=purpose, description=purpose, parents=[shared])
    return parser


def _run(client: Client, options: argparse.Namespace) -> int:
    if options.verb == "ready":
        is_ready = client.is_ready()
        print(json.dumps({"ready": is_ready}) if options.json else "ready" if is_ready else "not ready")
        return 0 if is_ready else _SERVICE_FAILED
    if options.verb == "status":
        return _status(client.status(), options)
    if options.verb == "generator":
        if options.save:
            _writable(options.save)  # before anything is asked
        return _show(_draw(client, options), options)
    if options.verb == "sentiment":
        return _show(_each(client.sentiment, _sentences(options.inputs)), options)
    if options.verb == "detection":
        if options.save and len(options.inputs) > 1:
            options.save.mkdir(parents=True, exist_ok=True)
        elif options.save and not options.save.is_dir():
            _writable(options.save)

        def detect(inputs: Iterator[Any]) -> Iterator[Detection]:
            found: Iterator[Detection] = client.detection(inputs, options.min_confidence)
            return found

        return _show(_kept(_each(detect, options.inputs), options), options)
    ask = client.digit if options.verb == "digit" else client.image
    return _show(_each(ask, options.inputs), options)


def _each(
    ask: Callable[[Iterator[Any]], Iterator[Answer]], names: Sequence[str]
) -> Iterator[tuple[str, Answer | Exception]]:
    """Each input's name, with its answer or what is wrong with it: one bad input spoils no other."""
    done = 0
    is_text = getattr(ask, "__name__", "") == "sentiment"
    while done < len(names):
        inputs = islice(names, done, None)
        try:
            for answer in ask(inputs if is_text else map(_picture, inputs)):
                yield names[done], answer
                done += 1
        except (BadInput, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            yield names[done], error
            done += 1


def _picture(name: str) -> bytes | Path:
    return sys.stdin.buffer.read() if name == "-" else Path(name)


def _sentences(texts: list[str]) -> list[str]:
    """The texts, with those of standard input in the place of "-".

    Raises:
        _BadUse: there are none.
    """
    if not texts and sys.stdin.isatty():
        raise _BadUse('name a text, such as quintet sentiment "loved it", or send lines to standard input')
    sentences = []
    for text in texts or ["-"]:
        lines = sys.stdin.read().splitlines() if text == "-" else [text]
        sentences += [line for line in lines if line.strip() or text != "-"]
    if not sentences:
        raise _BadUse("standard input held no text; send a text a line")
    return sentences


def _draw(client: Client, options: argparse.Namespace) -> Iterator[tuple[str, Answer]]:
    """Draw digits, and keep them: each in a file, or all in one."""
    drawn = client.generator(options.inputs or None, seed=options.seed)
    if options.save:
        pictures.grid([one.to_pillow() for one in drawn]).save(options.save)
        yield from ((str(options.save), one) for one in drawn)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for one in drawn:
        path = options.out / f"{one.digit}-{one.seed}.png"
        one.save(path)
        yield str(path), one


def _kept(
    answers: Iterable[tuple[str, Answer | Exception]], options: argparse.Namespace
) -> Iterator[tuple[str, Answer | Exception]]:
    """Write each picture with its boxes, where that was asked for."""
    for name, answer in answers:
        if options.save and isinstance(answer, Detection):
            file = "stdin.png" if name == "-" else Path(name).name
            answer.save(options.save / file if options.save.is_dir() else options.save)
        yield name, answer


def _writable(path: Path) -> Path:
    """A path whose ending names a format of pictures.

    Raises:
        _BadUse: it does not.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        raise _BadUse(f"{path} must end in .png, .jpg, .webp or .bmp")
    return path


def _show(answers: Iterator[tuple[str, Answer | Exception]], options: argparse.Namespace) -> int:
    """Print the answers: at a terminal a table, else a line each as it comes; complaints apart."""
    is_table = sys.stdout.isatty() and not options.json
    rows: list[tuple[str, Answer]] = []
    complaints: list[str] = []
    with _waiting(options) as count:
        try:
            for name, answer in answers:
                count(1)
                if isinstance(answer, Exception):
                    known = _sentence(answer)
                    complaints.append(known if isinstance(answer, OSError) else f"{_shorten(name)}: {known}")
                elif is_table:
                    rows.append((name, answer))
                elif options.json:
                    print(json.dumps({"input": name} | as_dict(answer), ensure_ascii=False))
                else:
                    print(f"{_shorten(name)}: {answer}", flush=True)
        finally:
            if rows:
                _print_table(rows, options)
    for complaint in complaints:
        _complain(complaint)
    return _BAD_USE if complaints else 0


def _waiting(options: argparse.Namespace) -> Any:
    """A bar on standard error, where a person waits for a table."""
    is_long = len(options.inputs) > 1 and sys.stdout.isatty() and sys.stderr.isatty() and not options.json
    return bars.bar(options.verb, len(options.inputs)) if is_long else bars.no_bar()


def _print_table(rows: Sequence[tuple[str, Answer]], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    first = rows[0][1]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    if isinstance(first, Classification):
        for heading in ("input", "answer", "", "next"):
            table.add_column(heading, overflow="fold")
        table.add_column("ms", justify="right")
    elif isinstance(first, Detection):
        for heading in ("input", "found", "size"):
            table.add_column(heading, overflow="fold")
        table.add_column("ms", justify="right")
    else:
        for heading in ("digit", "seed", "file"):
            table.add_column(heading, overflow="fold")
    for name, answer in rows:
        milliseconds = f"{answer.seconds * 1000:.0f}"
        if isinstance(answer, Classification):
            filled = round(answer.confidence * _BAR_WIDTH)
            bar = Text("━" * filled, "green") + Text("━" * (_BAR_WIDTH - filled), "bright_black")
            bar.append(f" {in_percent(answer.confidence)}")
            following = " · ".join(f"{label} {in_percent(share)}" for label, share in answer.ranked()[1:2])
            table.add_row(_shorten(name), Text(answer.label, "bold"), bar, following, milliseconds)
        elif isinstance(answer, Detection):
            size = f"{answer.width} x {answer.height}"
            table.add_row(_shorten(name), Text(str(answer), "bold"), size, milliseconds)
        else:
            table.add_row(Text(str(answer.digit), "bold"), str(answer.seed), name)
    Console().print(table)


def _status(status: Status, options: argparse.Namespace) -> int:
    if options.json:
        models = {name: list(versions) for name, versions in status.models.items()}
        print(json.dumps({"ready": status.is_ready, "server": status.server, "models": models}))
    else:
        print(f"{options.url}: {status.server}, {'ready' if status.is_ready else 'not ready'}", end="")
        print(f", {status.seconds * 1000:.0f} ms away")
        for name, versions in status.models.items():
            print(f"  {name:<10} {'version ' + ', '.join(versions) if versions else 'not loaded'}")
    return 0 if status.is_ready else _SERVICE_FAILED


def _sentence(error: Exception) -> str:
    """What is wrong, in a sentence without an end."""
    if isinstance(error, IsADirectoryError):
        return f"{error.filename}: this is a folder; name the pictures in it, such as {error.filename}/*.png"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: there is no such file"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {(error.strerror or '').lower()}"
    return str(error)


def _complain(sentence: str) -> None:
    print(f"quintet: {sentence}", file=sys.stderr)


def _shorten(name: str) -> str:
    """A name that fits its line: texts may be long, and hold line ends."""
    name = " ".join(name.split())
    return name if len(name) <= _WIDEST_NAME else f"{name[: _WIDEST_NAME - 1]}…"


if __name__ == "__main__":
    raise SystemExit(main())
