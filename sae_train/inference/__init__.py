"""A released SAE: encode and decode, and the formats it is written in and read from.

Anyone's release can be read here, ours or another tool's.
"""
