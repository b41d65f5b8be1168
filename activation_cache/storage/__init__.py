"""Bytes on a disk, in a bucket or on the Hub: files, arrays, leases, records with checksums.

It knows neither Gemma nor activations, and imports `runtime` alone.
"""
