"""The Gemma architecture: its config, parameters, forward pass, taps, and replicas on a mesh.

Arrays in, arrays out: the room reads no file. It imports `runtime`, `config` and `mesh`.
"""
