"""`sae browse`: local pages about latents, and the same pages as a folder for any web server.

`catalogue` and `listing` make JSON of what `sae_train.latents` reads, without JAX; `server` answers
a browser with it; `requests` runs the model for texts; `site/` is the front end, plain modules that
the browser loads as they are.
"""
