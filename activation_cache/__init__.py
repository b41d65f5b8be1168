"""From text to an activation store, and from the store to batches.

Rooms, each importing only those before it: `runtime`, `config` and `mesh`, `storage`, `gemma`,
`language_model`, `text`, `store`, `harvest`.
"""
