"""A run directory: where it is, what is written down in it, what a stored file may say, how a run goes on."""
