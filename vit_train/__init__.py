"""vit-train: a config-driven trainer for vision transformers.

The command line is the product (see README.md); docs/ARCHITECTURE.md explains the rooms of this package.
Importing it is free: nothing here loads torch.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vit-train")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
