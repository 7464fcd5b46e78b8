import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from vit_train.layers import WindowAttention
from vit_train.layers import window as window_module


def attention(window_size, **overrides):
    torch.manual_seed(0)
    module = WindowAttention(8, num_heads=2, window_size=window_size, **overrides)
    # Bias and table far from zero, so that a wrong index or a forgotten bias shows.
    torch.nn.init.normal_(module.relative_position_bias_table)
    if module.qkv.bias is not None:
        torch.nn.init.normal_(module.qkv.bias)
    return module


def reference(module, x, *, shifts, mask_padding):
    """Window attention token by token, straight from the definition: pad, and let each query look around.

    A token of the padded map attends to those of the same shifted window that the cyclic shift did not bring
    there from the other side.
    """
    B, h, w, C = x.shape
    W, H = module.window_size, module.num_heads
    padded_h, padded_w = -(-h // W) * W, -(-w // W) * W
    qkv = module.qkv(F.pad(x, (0, 0, 0, padded_w - w, 0, padded_h - h)))
    q, k, v = qkv.view(B, padded_h, padded_w, 3, H, C // H).unbind(3)

    def place(row, col):
        """Window, region and position in the window of a token."""
        spots = [((i - s) % n, n, s) for i, n, s in ((row, padded_h, shifts[0]), (col, padded_w, shifts[1]))]
        return (
            tuple(p // W for p, _, _ in spots),
            tuple(p >= n - s for p, n, s in spots),
            tuple(p % W for p, _, _ in spots),
        )

    everyone = [(row, col) for row in range(padded_h) for col in range(padded_w)]
    out = torch.zeros(B, h, w, C)
    for row in range(h):
        for col in range(w):
            mine, region, (y, z) = place(row, col)
            keys, biases = [], []
            for other in everyone:
                if mask_padding and (other[0] >= h or other[1] >= w):
                    continue
                theirs, their_region, (y2, z2) = place(*other)
                if theirs == mine and their_region == region:
                    keys.append(other)
                    index = (y - y2 + W - 1) * (2 * W - 1) + z - z2 + W - 1
                    biases.append(module.relative_position_bias_table[index])
            rows, cols = (torch.tensor(axis) for axis in zip(*keys))
            scores = torch.einsum("bhd,bkhd->bhk", q[:, row, col], k[:, rows, cols]) / (C // H) ** 0.5
            weights = (scores + torch.stack(biases).T).softmax(-1)
            out[:, row, col] = torch.einsum("bhk,bkhd->bhd", weights, v[:, rows, cols]).flatten(1)
    return module.proj(out)


# map (h, w), window, shift along each axis
CASES = [
    ((4, 4), 4, (0, 0)),  # exactly one window
    ((8, 4), 4, (2, 0)),  # several along one axis
    ((8, 8), 4, (2, 2)),
    ((5, 7), 3, (1, 1)),  # padded
    ((4, 7), 5, (0, 2)),  # window larger than the map along one axis
    ((3, 2), 5, (0, 0)),
    ((1, 2), 6, (0, 0)),
    ((7, 7), 6, (3, 3)),  # a region of nothing but padding
]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("size", "window", "shifts"), CASES)
def test_equals_the_definition(size, window, shifts, shifted):
    x = torch.randn(2, *size, 8, requires_grad=True)
    for mask_padding, qkv_bias in ((True, True), (False, True), (False, False)):
        module = attention(window, shifted=shifted, mask_padding=mask_padding, qkv_bias=qkv_bias)
        expected = reference(module, x, shifts=shifts if shifted else (0, 0), mask_padding=mask_padding)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        inputs, weight = (x, *module.parameters()), torch.randn_like(expected)
        gradients = torch.autograd.grad(module(x), inputs, weight)
        wanted = torch.autograd.grad(expected, inputs, weight)
        torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "window"), [((8, 8), 4), ((5, 7), 3), ((7, 7), 6), ((3, 2), 5)])
def test_mask_padding_matters_exactly_where_there_is_padding(size, window):
    hide, show = (attention(window, shifted=True, mask_padding=flag) for flag in (True, False))
    x = torch.randn(1, *size, 8)
    padded = any(n % window for n in size)
    assert torch.allclose(hide(x), show(x), atol=1e-6) is not padded


@pytest.mark.parametrize("size", range(1, 20))
@pytest.mark.parametrize("shifted", [False, True])
def test_spans_are_the_windows_that_a_shifted_padded_axis_has(size, shifted):
    """Those that torchvision rolls and pads, without the padding and what the roll brought together."""
    for window in range(1, 8):
        padded = -(-size // window) * window
        shift = window // 2 if shifted and padded > window else 0
        place = [(token - shift) % padded for token in range(padded)]
        # windows on the rolled axis, a part that the roll wrapped being one of its own
        windows = [(p // window, p >= padded - shift) for p in place]
        real = Counter(windows[:size])
        for mask_padding in (True, False):
            module = attention(window, shifted=shifted, mask_padding=mask_padding)
            each = [span for span in module.spans(size) for _ in range(span.length // span.window)]
            assert [span.window for span in each] == list(real.values())
            seen = real if mask_padding else Counter(windows)
            assert [span.window + span.padding for span in each] == [seen[key] for key in real]


@pytest.mark.parametrize("mask_padding", [False, True])
def test_fused_attention_gives_the_same(monkeypatch, mask_padding):
    module = attention(3, shifted=True, mask_padding=mask_padding)
    x = torch.randn(2, 5, 7, 8)
    plain = module(x)
    monkeypatch.setattr("vit_train.layers.attention.prefers_fused", lambda q: True)
    torch.testing.assert_close(module(x), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_bf16_autocast_stays_near_fp32_with_gradients(mask_padding):
    for window in (3, 6):
        module = attention(window, shifted=True, mask_padding=mask_padding)
        x = torch.randn(2, 7, 7, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = module(x)
            low.float().square().sum().backward()
        torch.testing.assert_close(low.float(), module(x), rtol=0.1, atol=0.1)
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_indices_are_computed_once_and_are_no_state():
    module = attention(3, shifted=True)
    assert set(module.state_dict()) == {
        "qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "relative_position_bias_table",
    }  # fmt: skip
    assert module.relative_position_bias_table.shape == (25, 2)
    window_module._kept_index.cache_clear()
    x = torch.randn(1, 5, 7, 8)
    module(x)
    copy.deepcopy(module)(x)
    info = window_module._kept_index.cache_info()
    # 1, 3 and 1 rows by 1 and 6 columns: six pieces, whose windows have four sizes
    assert (info.misses, info.hits) == (4, 8)
    module(torch.randn(1, 8, 10, 8))  # more windows of the same sizes
    assert window_module._kept_index.cache_info().misses == 4


@pytest.mark.parametrize("mask_padding", [False, True])
def test_training_after_a_first_call_in_inference_mode(mask_padding):
    window_module._kept_index.cache_clear()
    module = attention(3, shifted=True, mask_padding=mask_padding)
    x = torch.randn(1, 5, 7, 8)
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert module.relative_position_bias_table.grad is not None


@pytest.mark.parametrize("mask_padding", [False, True])
def test_meta_device(mask_padding):
    with torch.device("meta"):
        module = attention(3, shifted=True, mask_padding=mask_padding)
        assert module(torch.empty(2, 5, 7, 8)).shape == (2, 5, 7, 8)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_export_and_compile_capture_one_graph(mask_padding):
    module = attention(3, shifted=True, mask_padding=mask_padding).eval()
    x = torch.randn(2, 5, 7, 8)
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    y = torch.randn(3, 5, 7, 8)
    torch.testing.assert_close(exported.module()(y), module(y))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mask_padding", [False, True])
def test_the_trace_of_tensorboards_graph_does_not_depend_on_what_ran_before(mask_padding):
    """It traces twice, and refuses a model whose second graph differs."""
    window_module._kept_index.cache_clear()
    module = attention(3, shifted=True, mask_padding=mask_padding).eval()
    x = torch.randn(1, 5, 7, 8)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_errors():
    with pytest.raises(ValueError, match="num_heads 3 does not divide embed_dim 8; use one of 1, 2, 4, 8"):
        WindowAttention(8, num_heads=3, window_size=2)
