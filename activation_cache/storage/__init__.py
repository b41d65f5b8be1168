"""Bytes on a disk, in a bucket or on the Hub: files, arrays, leases, records with checksums.

The room owns atomic writes, retries, and the wording of what a disk or a server refuses. It knows
neither Gemma nor activations, and imports only `runtime`.
"""
