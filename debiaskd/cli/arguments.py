"""Arguments in any order: options may stand before or after what they belong to, up to the command's name itself."""

from __future__ import annotations

import argparse
import difflib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """Something the user can put right: printed as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """Errors in one line instead of a page of usage.

    Attributes:
        takes_keys: options that it does not know are keys of a recipe, each with a value.
        more: makes what stands below the help.
    """

    takes_keys = False
    more: Callable[[int], str] | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        text = super().format_help()
        return text if self.more is None else f"{text}\n{self.more(shutil.get_terminal_size().columns - 2)}"


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options; `overrides` has the keys of a recipe with their values, as typed.

    Raises:
        UsageError: arguments that cannot be understood.
    """
    in_order, overrides = _ordered(parser, list(arguments))
    options, rest = parser.parse_known_args(in_order)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = overrides
    return options


def _ordered(parser: Parser, arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the commands, then options, then what is no option; the keys of a recipe)."""
    commands: list[str] = []
    while (choices := _choices(parser)) is not None:
        own, inner = _values(parser), {name: n for sub in _below(parser) for name, n in _values(sub).items()}
        keys = any(sub.takes_keys for sub in _below(parser))
        moved: list[str] = []
        for tokens in _tokens(arguments, {**inner, **own}, keys):
            arguments = arguments[len(tokens) :]
            if not tokens[0].startswith("-") or tokens[0] == "--":
                commands, arguments = [*commands, tokens[0]], [*moved, *arguments]
                break
            (commands if tokens[0] in own else moved).extend(tokens)
        else:
            return commands, []
        if commands[-1] not in choices:
            return [*commands, *arguments], []
        parser = choices[commands[-1]]
    if any(action.nargs == argparse.REMAINDER for action in parser._actions):
        return [*commands, *arguments], []
    return _leaf(parser, commands, arguments)


def _leaf(parser: Parser, commands: list[str], arguments: list[str]) -> tuple[list[str], list[str]]:
    options: list[str] = []
    others: list[str] = []
    overrides: list[str] = []
    known = _values(parser)
    while arguments:
        tokens = next(_tokens(arguments, known, parser.takes_keys))
        arguments = arguments[len(tokens) :]
        name = tokens[0].partition("=")[0]
        if name == "--":
            others, arguments = [*others, "--", *arguments], []
        elif not name.startswith("-") or name == "-" or _negative(name):
            others += tokens
        elif name in known:
            if known[name] == 1 and tokens == [name]:
                parser.error(f"argument {name}: expected one argument")
            # In one piece a value may begin with a dash.
            options += [f"{name}={tokens[1]}"] if known[name] == 1 and len(tokens) == 2 else tokens
        elif parser.takes_keys and name.startswith("--"):
            overrides += tokens
        else:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"unrecognized arguments: {' '.join(tokens)}{hint}")
    return [*commands, *options, *others], overrides


def _tokens(arguments: Sequence[str], known: Mapping[str, int], keys: bool) -> Iterator[list[str]]:
    """Options with their values, and single other arguments."""
    rest = list(arguments)
    while rest:
        name, sign, _ = rest[0].partition("=")
        count = 0 if sign or not name.startswith("--") or name == "--" else known.get(name, int(keys))
        taken = 1
        while taken <= count and taken < len(rest) and not rest[taken].startswith("--"):
            taken += 1
        yield rest[:taken]
        rest = rest[taken:]


def _negative(text: str) -> bool:
    return text[1:].replace(".", "", 1).isdecimal()


def _choices(parser: Parser) -> dict[str, Parser] | None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return None


def _below(parser: Parser) -> Iterator[Parser]:
    for inner in (_choices(parser) or {}).values():
        yield inner
        yield from _below(inner)


def _values(parser: Parser) -> dict[str, int]:
    """How many values each option takes."""
    return {
        name: 1 if action.nargs is None else action.nargs if isinstance(action.nargs, int) else 0
        for name, action in parser._option_string_actions.items()
    }


def positive(text: str) -> int:
    """Parse an integer >= 1, as an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Parse an integer >= 0, as an argparse type."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got {text!r}")
    return int(text)
