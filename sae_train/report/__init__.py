"""One page about a sweep, made from the JSON files of its runs.

It loads no JAX.
"""
