"""Checkpoint directories that appear whole or not at all, and are verified before anything is read from them.

    checkpoints/step_00001234/  model.safetensors  ema.safetensors  optimizer.safetensors
                                state.json         manifest.json (size and SHA-256 of each of them)
    checkpoints/last, best      relative links to such directories
    checkpoints/.partial_*      what a save or a removal is working on; left behind only by a crash

A directory is written aside, every file synced, the manifest last; then it is renamed into place and its
parent synced. Loading verifies the manifest first, then sizes and shapes, and only then reads tensors. No
pickle anywhere: tensors are safetensors, the rest is JSON. Optimizer tensors are named
`<parameter name>/<slot>`.
"""

from .layout import MANIFEST, checkpoint_directories, directory_name, resolve_link
from .read import (
    Checkpoint,
    Fits,
    Shapes,
    check_shapes,
    fits_model,
    load,
    load_run,
    load_state,
    must_be_readable,
    newest_valid,
)
from .write import Checkpointer, Snapshot

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "Checkpointer",
    "Fits",
    "Shapes",
    "Snapshot",
    "check_shapes",
    "checkpoint_directories",
    "directory_name",
    "fits_model",
    "load",
    "load_run",
    "load_state",
    "must_be_readable",
    "newest_valid",
    "resolve_link",
]
