"""The architecture: config, parameters, the forward pass and its taps.

Arrays in, arrays out: it reads no file.
"""
