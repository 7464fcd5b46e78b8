"""From a file to numbers: decoded, augmented one by one (CPU) and as a batch (device), measured."""
