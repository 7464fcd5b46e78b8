"""The only way back in: a trained model from a run, and what it can be asked for."""
