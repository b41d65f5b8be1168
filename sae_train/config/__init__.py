"""The config of one run: its keys, defaults and rules.

It knows no sweep and no cluster, and loads no JAX.
"""
