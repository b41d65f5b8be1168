"""A released SAE: encode, decode, and the file formats it is written in and read from.

Reads anyone's release, ours or another tool's. `fold` makes one from trained weights. It imports
`config` and `model`, and for `fold` the trained weights of `checkpoint`; never the trainer.
"""
