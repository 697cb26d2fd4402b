"""The filter language: nfdump's grammar, and words for slices (docs/filter.md).

    expression = parse("src net 192.0.2.0/24 and slice princeton_*")
    condition = sql.condition(expression, put)

grammar.lark  which words may follow which
values        what the words between the keywords mean
tree          what was meant
reading       from text to tree, within limits
errors        what to say of a text that means nothing
sql           from tree to a condition over records
"""

from netflow.language.errors import FilterError
from netflow.language.reading import MAX_DEPTH, MAX_LENGTH, MAX_TESTS, MAX_VALUES, parse
from netflow.language.tree import ALL, All, And, Expression, Not, Or, Test

__all__ = [
    "ALL",
    "MAX_DEPTH",
    "MAX_LENGTH",
    "MAX_TESTS",
    "MAX_VALUES",
    "All",
    "And",
    "Expression",
    "FilterError",
    "Not",
    "Or",
    "Test",
    "parse",
]
