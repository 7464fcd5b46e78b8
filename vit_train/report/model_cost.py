"""The tables of `vit-train summary=true`: what a model costs, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from vit_train.models.cost import Layer, Shape
from vit_train.report.summary import key_value_table
from vit_train.text import count

if TYPE_CHECKING:
    from vit_train.config.describe import Described


def layer_table(layers: list[Layer]) -> Table:
    """One line for each layer and one for all of them."""
    freezes = any(layer.frozen for layer in layers)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_footer=True)
    total = Layer(
        "total",
        parameters=sum(layer.parameters for layer in layers),
        frozen=sum(layer.frozen for layer in layers),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        activation_bytes=sum(layer.activation_bytes for layer in layers),
    )
    cells = [_cells(layer, freezes) for layer in (*layers, total)]
    for heading, footer in zip(cells[-1], cells.pop().values()):
        is_text = heading in ("layer", "input", "output")
        table.add_column(heading, footer, justify="left" if is_text else "right", overflow="fold")
    for row in cells:
        table.add_row(*row.values())
    return table


def _cells(layer: Layer, freezes: bool) -> dict[str, str]:
    frozen = {"frozen": f"{layer.frozen:,}"} if freezes else {}
    return {
        "layer": layer.name,
        "input": _sides(layer.input),
        "output": _sides(layer.output),
        "parameters": f"{layer.parameters:,}",
        **frozen,
        "MMACs": f"{layer.multiply_adds / 1e6:,.1f}",
        "kept MB": f"{layer.activation_bytes / 1e6:,.1f}",
    }


def _sides(shape: Shape | None) -> str:
    return "" if shape is None else "x".join(str(side) for side in shape)


def description(described: Described) -> list[RenderableType]:
    """Everything `summary=true` prints: the model, its layers, the memory of a training step, assumptions."""
    config, memory, layers = described.config, described.memory, described.layers
    data, settings = config["data"], config["trainer"]
    parameters, frozen = (sum(getattr(row, which) for row in layers) for which in ("parameters", "frozen"))
    side, pieces = data["img_size"], settings["grad_accum_steps"]
    batch = count(described.micro_batch, "image") + (f", one of {pieces} micro-batches" if pieces > 1 else "")
    facts = {
        "model": f"{_short(config['model'])}, {parameters:,} parameters"
        + (f", {frozen:,} of them frozen" if frozen else ""),
        "an image": f"{data['in_channels']} x {side} x {side}, {described.multiply_adds / 1e9:.3g} GMACs "
        f"(multiply-adds, what papers call FLOPs), {count(data['num_classes'], 'class')}",
    }
    sizes = {
        "weights": _megabytes(memory.parameters),
        "gradients": _megabytes(memory.gradients),
        "optimizer": f"{_megabytes(memory.optimizer)}  {_short(config['optimizer'])}",
        **({"average": _megabytes(memory.ema)} if memory.ema else {}),
        **({"teacher": _megabytes(memory.teacher)} if memory.teacher else {}),
        "activations": f"{_megabytes(memory.activations)}  {batch} in {settings['precision']} "
        f"on {described.device}",
        "together": f"{_megabytes(memory.total)}  while training; kernels and torch itself come on top",
    }
    notes = {"note" if not i else f"note {i + 1}": note for i, note in enumerate(described.notes)}
    return [
        key_value_table(facts),
        "",
        layer_table(layers),
        "\nMMACs: million multiply-adds, one image; kept: for the backward pass, one batch\n",
        key_value_table({**sizes, **notes}),
    ]


def _short(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rsplit(".", 1)[-1]


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:>10,.1f} MB"
