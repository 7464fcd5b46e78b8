"""A trained model as a file that other software loads: ONNX, torch.export, or weights under other names.

The way out, as trained.py is the way in. Every file carries how to feed it and how to read its answers, as
JSON under the key `vit_train`:

    onnx          metadata_props["vit_train"]
    pt2           the extra file vit_train.json
    safetensors   metadata["vit_train"]
    pth           {"state_dict": ..., "vit_train": ...}

A file is made in memory, loaded again by the software it is for and compared with the model, and only then
may it be written. Graphs take any number of images of the one size, on the CPU, in fp32; a DeiT answers with
the mean of its heads.

Shapes: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit_train.data.transforms.sample_transforms import shorter_side
from vit_train.errors import ConfigError, SaveError, ran_out
from vit_train.inference.trained import Trained, without_download
from vit_train.runs.record import package_versions
from vit_train.weights import Layout, differs_in_timm, state_dict_named
from vit_train.weights.names import to_ours

Format = Literal["onnx", "pt2", "safetensors", "pth"]
Forward = Callable[[Tensor], Tensor]

KEY = "vit_train"
EXTRA_FILE = f"{KEY}.json"  # in a pt2
BATCH_SIZES = (1, 3, 17)  # a graph was traced with none of them
# Between the logits of the file and the model's. onnxruntime has other kernels, the rest has ours.
MAX_DIFFERENCE: dict[Format, float] = {"onnx": 1e-4, "pt2": 1e-5, "safetensors": 0.0, "pth": 0.0}

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_MAX_BYTES = 2**31 - 2**24  # protobuf's limit for one file, less room for the graph


def describe(trained: Trained, file_format: Format, *, layout: Layout = "timm") -> dict[str, Any]:
    """What a file carries beside the numbers: plain data, for JSON.

    `layout` says whose parameter names a file of weights has.
    """
    side, channels = trained.img_size, trained.in_channels
    is_weights = file_format in ("safetensors", "pth")
    crop = trained.resize == "crop"
    colours = "RGB" if channels == 3 else "grey"
    resized = (
        f"the shorter side resized to {shorter_side(side)} pixels, the longer in proportion (rounded down), "
        f"and the centre {side} x {side} cut out"
        if crop
        else f"resized to {side} x {side} pixels whatever the aspect ratio"
    )
    scaled = "more than 8 bits scaled from {:g} to {:g} to 0 to 255, "
    deep = "" if trained.value_range is None else scaled.format(*trained.value_range)
    return {
        "format": file_format,
        "input": f"images: float32 (B, {channels}, {side}, {side}); {colours}, "
        f"transparency on the colour {list(trained.background)}, {deep}{resized} (bicubic, antialiased), "
        "then (value / 255 - mean) / std for each channel",
        "output": f"logits: float32 (B, {len(trained.class_names)}), before softmax, in the order of "
        "class_names",
        "img_size": side,
        "in_channels": channels,
        "resize": trained.resize,
        "resize_shorter_side": shorter_side(side) if crop else None,
        "value_range": trained.value_range,
        "mean": list(trained.mean),
        "std": list(trained.std),
        "class_names": trained.class_names,
        "weights": trained.weights,
        "step": trained.step,
        "names": layout if is_weights else None,
        "model": without_download(trained.config["model"]),
        "note": differs_in_timm(trained.model) if layout == "timm" and is_weights else None,
        "versions": package_versions(),
    }


def check_possible(file_format: Format, model: nn.Module) -> None:
    """What can be known before the work.

    Raises:
        ConfigError: a package is missing, or the model is too large for the format.
    """
    if file_format != "onnx":
        return
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {', '.join(missing)}: pip install 'vit-train[export]'")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > _ONNX_MAX_BYTES:
        raise ConfigError(
            f"the model has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2; type --format pt2"
        )


def make_file(
    model: nn.Module,
    file_format: Format,
    *,
    images: Tensor,
    about: dict[str, Any],
    layout: Layout = "timm",
) -> bytes:
    """The content of a file.

    Args:
        model: in evaluation mode, on the CPU, fp32.
        file_format: which kind.
        images: (2, C, H, W), an example to trace with; any values.
        about, layout: see `describe`.

    Raises:
        ConfigError: the other project has no such model.
        SaveError: torch cannot export this model.
    """
    described = json.dumps(about)  # ASCII: a class name may hold what UTF-8 cannot
    if file_format in ("onnx", "pt2"):
        with _refused(f"torch cannot export this model as {file_format}"), _quiet():
            make = _onnx_file if file_format == "onnx" else _pt2_file
            return make(model, images, described)
    # clones: two names may share one tensor, which safetensors refuses
    tensors = {name: t.detach().clone().contiguous() for name, t in state_dict_named(model, layout).items()}
    if file_format == "safetensors":
        from safetensors.torch import save

        return save(tensors, {"format": "pt", KEY: described})
    buffer = io.BytesIO()
    torch.save({"state_dict": tensors, KEY: described}, buffer)
    return buffer.getvalue()


def load_file(content: bytes, file_format: Format, model: nn.Module) -> Forward:
    """The file as its own software understands it: images (B, C, H, W) -> logits (B, K).

    A file of weights is loaded into a copy of the model whose own weights are gone.

    Raises:
        RuntimeError: a file of weights does not fit the model.
    """
    if file_format == "onnx":
        return _load_onnx(content)
    if file_format == "pt2":
        return torch.export.load(io.BytesIO(content)).module()
    if file_format == "safetensors":
        from safetensors.torch import load

        tensors = load(content)
    else:
        tensors = torch.load(io.BytesIO(content), weights_only=True)["state_dict"]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.zero_()
    # a model of the user's own may have names that are another project's for ours
    copied.load_state_dict(tensors if tensors.keys() == copied.state_dict().keys() else to_ours(tensors)[0])
    return copied


def largest_difference(forward: Forward, model: nn.Module, *, image_shape: tuple[int, int, int]) -> float:
    """The largest distance between two models' logits, for batches of 1, 3 and 17 random images (C, H, W).

    Not a number where one of them is not.

    Raises:
        ValueError: the shapes of their answers differ.
    """
    generator = torch.Generator().manual_seed(0)
    distances = []
    for size in BATCH_SIZES:
        images = torch.randn(size, *image_shape, generator=generator)
        with torch.no_grad():
            expected, got = model(images), forward(images)
        if got.shape != expected.shape:
            raise ValueError(
                f"it answers {size} images with {tuple(got.shape)}, the model with {tuple(expected.shape)}"
            )
        distances.append((got - expected).abs().max())
    return float(torch.stack(distances).max())


def verify(
    content: bytes, file_format: Format, model: nn.Module, *, image_shape: tuple[int, int, int]
) -> float:
    """Loads a file again and compares it with the model; returns their `largest_difference`.

    Raises:
        SaveError: it cannot be loaded, or computes something else.
    """
    with _refused(f"the {file_format} file cannot be loaded again"):
        loaded = load_file(content, file_format, model)
        difference = largest_difference(loaded, model, image_shape=image_shape)
    allowed = MAX_DIFFERENCE[file_format]
    if not difference <= allowed:  # also where it is not a number
        raise SaveError(
            f"the {file_format} file was loaded again and its logits differ from the model's by "
            f"{difference:.1e}, more than {allowed:g}"
        )
    return difference


def _program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The graph of a forward pass for any number of images."""
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for node in program.graph.nodes:  # where this machine keeps its Python files is nobody's business
        node.meta.pop("stack_trace", None)
    return program


def _pt2_file(model: nn.Module, images: Tensor, described: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_program(model, images), buffer, extra_files={EXTRA_FILE: described})
    return buffer.getvalue()


def _onnx_file(model: nn.Module, images: Tensor, described: str) -> bytes:
    exported = torch.onnx.export(
        _program(model, images),
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch"}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    graph = exported.model_proto
    for node in graph.graph.node:  # notes of the exporter for its own debugging
        del node.metadata_props[:]
    graph.metadata_props.add(key=KEY, value=described)
    return graph.SerializeToString()


def _load_onnx(content: bytes) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (name,) = (node.name for node in session.get_inputs())
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever a compiler or another runtime says, with its first line, unless something ran out."""
    try:
        yield
    except Exception as error:
        if ran_out(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SaveError(f"{what}: {lines[0].strip()}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say to those who write exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
