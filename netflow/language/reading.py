"""From a filter's text to its tree."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

from netflow.language import values
from netflow.language.errors import FilterError, unexpected, unread
from netflow.language.tree import (
    ALL,
    COUNTERS,
    And,
    Comparison,
    Expression,
    Not,
    Or,
    Side,
    Test,
    Value,
    What,
    joined,
    negated,
)

if TYPE_CHECKING:
    from lark import Lark, Token

# So that no filter, from whomever, can exhaust the collector.
MAX_LENGTH = 16 * 1024
"""Characters of a filter."""
MAX_DEPTH = 32
"""Parentheses within parentheses."""
MAX_TESTS = 256
"""Tests in a filter."""
MAX_VALUES = 1000
"""Values in all lists of a filter together."""
_MAX_VALUE = 256

T = TypeVar("T")
_COMPARISONS: dict[str, Comparison] = {
    "=": "=", "==": "=", "eq": "=", "<": "<", "lt": "<", "<=": "<=", "le": "<=",
    ">": ">", "gt": ">", ">=": ">=", "ge": ">=",
}  # fmt: skip
_ONE_SIDE: dict[str, Side] = {
    "src": "src", "initiator": "src", "originator": "src", "dst": "dst", "responder": "dst",
    "in": "src", "out": "dst", "total": "total",
}  # fmt: skip


class _Meaningless(Exception):
    """A word cannot mean what its place says."""

    def __init__(self, token: Token, message: str) -> None:
        self.token = token
        super().__init__(message)


@lru_cache(64)
def parse(text: str) -> Expression:
    """Read a filter; an empty one matches all. Raises FilterError."""
    if len(text) > MAX_LENGTH:
        raise FilterError(
            f"the filter is {len(text)} characters long: at most {MAX_LENGTH}", text, MAX_LENGTH
        )
    from lark import UnexpectedCharacters, UnexpectedToken

    parser = _parser()
    reading = parser.parse_interactive(text)
    before, last, limits = "", "", _Limits()
    try:
        for token in reading.iter_parse():
            before, last = last, token.type
            if too_much := limits.reached(token.type):
                raise _Meaningless(token, too_much)
        before = last
        found: Expression = reading.resume_parse()  # type: ignore[no-untyped-call]
        return found
    except UnexpectedToken as error:
        token = error.token
        end = token.type == "$END"
        accepted: set[str] = reading.accepts()  # type: ignore[no-untyped-call]
        expected = {kind: _written(parser, kind) for kind in accepted}
        message = unexpected("" if end else str(token), token.type, before, expected)
        position, length = (len(text.rstrip()), 1) if end else (token.start_pos or 0, len(token))
        raise FilterError(message, text, position, length) from None
    except UnexpectedCharacters as error:
        at = error.pos_in_stream or 0
        raise FilterError(unread(text[at]), text, at) from None
    except _Meaningless as error:
        token = error.token
        raise FilterError(str(error), text, token.start_pos or 0, len(token)) from None


@cache
def _parser() -> Lark:
    from lark import Lark

    return Lark(
        files("netflow.language").joinpath("grammar.lark").read_text("utf-8"),
        parser="lalr",
        # Basic: a word means the same wherever it stands, so that messages can
        # say what is wrong with its place.
        lexer="basic",
        maybe_placeholders=True,
        transformer=_meaning(),
    )


def _written(parser: Lark, kind: str) -> str:
    return kind if kind == "$END" else str(parser.get_terminal(kind).pattern.value)


class _Limits:
    """How much of a filter has been read."""

    def __init__(self) -> None:
        self.depth = self.tests = self.words = 0

    def reached(self, kind: str) -> str:
        """A message, once a token is one too many."""
        self.depth += (kind == "LPAR") - (kind == "RPAR")
        self.tests += kind in ("AND", "OR", "ANDAND", "OROR", "LPAR", "NOT", "BANG")
        self.words += kind in ("WORD", "STRING", "IPV6")
        if self.depth > MAX_DEPTH:
            return f"more than {MAX_DEPTH} parentheses within each other"
        if self.tests >= MAX_TESTS:
            return f"more than {MAX_TESTS} tests: put values into a list, in [...]"
        if self.words > MAX_VALUES:
            return f"more than {MAX_VALUES} values in one filter"
        return ""


def _convert(convert: Callable[[str], T], token: Token) -> T:
    """What a word means; a message that points at it otherwise."""
    text = str(token)
    if len(text) > _MAX_VALUE:
        raise _Meaningless(token, f"a value of {len(text)} characters: at most {_MAX_VALUE}")
    try:
        return convert(text[1:-1] if token.type == "STRING" else text)
    except ValueError as error:
        raise _Meaningless(token, str(error)) from None


def _meaning() -> Any:
    """The callbacks that make a tree while the parser reads: no recursion, however deep."""
    from lark import Transformer, v_args

    def no_more_than(last: int, what: str) -> Callable[[str], int]:
        return lambda text: values.number(text, last, what)

    port = no_more_than(65535, "a port")

    def test(
        what: What, convert: Callable[[str], Value], given: tuple[Any, list[Token]], side: Side
    ) -> Expression:
        comparison, tokens = given
        # Each value once, in the order given.
        found = tuple(dict.fromkeys(_convert(convert, token) for token in tokens))
        if comparison == "!=":
            return Not(Test(what, found, "=", side))
        return Test(what, found, comparison, side)

    @v_args(inline=True)
    class Meaning(Transformer[Any, Any]):
        # What a rule's callback gets is what the grammar says; [x] is None where it is not there.

        def start(self, found: Expression | None) -> Expression:
            return ALL if found is None else found

        def either(self, *parts: Any) -> Expression:
            return joined(Or, list(parts[::2]))

        def both(self, *parts: Any) -> Expression:
            return joined(And, list(parts[::2]))

        def negation(self, _: Token, part: Expression) -> Expression:
            return negated(part)

        def group(self, _: Token, part: Expression, __: Token) -> Expression:
            return part

        def everything(self, _: Token) -> Expression:
            return ALL

        def family(self, word: Token) -> Expression:
            return Test("family", (6 if word.endswith("6") else 4,))

        def translated(self, _: Token) -> Expression:
            return Test("nat")

        def ip(self, side: Side | None, nat: Token | None, _: Token, found: Any) -> Expression:
            return Test("nat ip" if nat else "ip", found, side=side or "any")

        def nat_ip(self, side: Side | None, _: Token, found: Any) -> Expression:
            return Test("nat ip", found, side=side or "any")

        def port(self, side: Side | None, nat: Token | None, _: Token, given: Any) -> Expression:
            return test("nat port" if nat else "port", port, given, side or "any")

        def nat_port(self, side: Side | None, _: Token, given: Any) -> Expression:
            return test("nat port", port, given, side or "any")

        def xid(self, side: Side | None, _: Token, given: Any) -> Expression:
            return test("xid", no_more_than(65535, "an xid"), given, side or "any")

        def slice(self, side: Side | None, _: Token, given: Any) -> Expression:
            return test("slice", values.name, given, side or "any")

        def node(self, _: Token, given: Any) -> Expression:
            return test("node", values.name, given, "any")

        def counter(self, side: Any, word: Token, given: Any) -> Expression:
            if side is None:
                side = "src"
            elif side in ("any", "both"):
                raise _Meaningless(
                    word, f"`total {word}` is of both sides together, `src {word}` of one"
                )
            else:
                side = _ONE_SIDE[side.lower()]
            [what] = [name for name in COUNTERS if name == word.lower()]
            return test(what, values.amount, given, side)  # type: ignore[arg-type]

        def duration(self, _: Token, given: Any) -> Expression:
            return test("duration", values.milliseconds, given, "any")

        def proto(self, _: Token, given: Any) -> Expression:
            return test("proto", values.protocol, given, "any")

        def icmp(self, word: Token, given: Any) -> Expression:
            what: What = "icmp-type" if word.lower() == "icmp-type" else "icmp-code"
            return test(what, no_more_than(255, f"an {what}"), given, "any")

        def reason(self, _: Token, given: Any) -> Expression:
            return test("reason", values.reason, given, "any")

        def state(self, _: Token, given: Any) -> Expression:
            return test("state", values.state, given, "any")

        def zone(self, _: Token, given: Any) -> Expression:
            return test("zone", no_more_than(65535, "a zone"), given, "any")

        def side(self, one: Side, joint: Token | None = None, other: Side | None = None) -> Side:
            if joint is None or one == other:
                return one
            return "any" if joint.type == "OR" else "both"

        def one(self, word: Token) -> Side:
            return _ONE_SIDE[word.lower()]

        def addresses(self, given: Token | list[Token]) -> tuple[Value, ...]:
            if isinstance(given, list):
                return tuple(dict.fromkeys(_convert(values.network, token) for token in given))
            return (_convert(values.address, given),)

        def network(self, token: Token, mask: Token | None) -> tuple[Value, ...]:
            return (_convert(lambda t: values.network(t, mask and str(mask)), token),)

        def numbers(self, first: Any, value: Token | None = None) -> tuple[Any, list[Token]]:
            if isinstance(first, list):
                return "=", first
            return first or "=", [value] if value is not None else []

        words = numbers

        def list(self, *tokens: Token) -> list[Token]:
            return [token for token in tokens if token.type in ("WORD", "STRING", "IPV6")]

        def comparator(self, token: Token) -> str:
            return "!=" if token.type in ("UNEQUAL", "NE") else _COMPARISONS[token.lower()]

    return Meaning()
