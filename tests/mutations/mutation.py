"""What a mutation of the code is (`mutations`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One line of the code said wrongly.

    Attributes:
        what: what is wrong then, as a person would say it.
        file: the file, from the top of the tree.
        right, wrong: a piece of it that stands there once, and what takes its place.
        test: the test that must fail, as pytest names it; a parametrised one without its
            parameters, or with them.
    """

    what: str
    file: str
    right: str
    wrong: str
    test: str
