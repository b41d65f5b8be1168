"""The config of one run: its keys, defaults and rules.

It knows no sweep and no cluster, loads no JAX, and imports of `activation_cache` alone.
"""
