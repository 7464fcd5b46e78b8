"""From samples to batches: which samples an epoch takes, who reads them, where finished ones are kept."""
