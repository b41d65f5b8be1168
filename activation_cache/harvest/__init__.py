"""Forward passes into a store: what is checked first, who computes what, how a bucket is filled.

The last room of the package: it may import all others.
"""
