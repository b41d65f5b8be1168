"""The run-time type check pytest puts on our packages (pyproject's `--jaxtyping-packages`)."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# PEP 484's numeric tower: an int is welcome where a float is asked for, as mypy has it.
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
