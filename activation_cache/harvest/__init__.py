"""Forward passes into a store: how work is shared out, and how a bucket of rows is filled.

The last room of the package: it may import all others.
"""
