"""One page about a run or a sweep, made from the JSON files in its folder.

It may import the configuration, the run folders and storage. It loads no JAX; the plotting library
stands in `charts` alone.
"""
