"""A fuzzer of the `sae` command: it breaks files and words at random and sees what comes of it.

An input is a change of a few files in a small pipeline (`world`) and a command that reads them. It
runs in this process. The command must end with 0, 2 or 75, in time, without an exception, and say
why in a few lines (`outcome`). Each input is made from the seed, its kind and its number alone, so
that one can be made again. `python -m tests.fuzz --help` runs them.
"""
