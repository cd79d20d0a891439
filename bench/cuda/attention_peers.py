"""PyTorch's attentions as contenders: SDPA's backends, flex_attention, varlen_attn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.layout import NO_PREFIX, PackedLayout

from .contest import Contender
from .exact import Inputs
from .goals import Rate

if TYPE_CHECKING:
    from .attention import Shape

BACKENDS = {
    "SDPA flash": ("FLASH_ATTENTION", True),
    "SDPA cuDNN": ("CUDNN_ATTENTION", True),
    "SDPA efficient": ("EFFICIENT_ATTENTION", False),
}
"""The enumeration's names, and whether they take groups of heads on one key head."""


def contenders(shape: Shape) -> list[Contender]:
    """All that can do this shape, and for shared prompts what people do without sharing."""
    found = [Contender("flex_attention", flex, prepare=_flex_inputs, lay=_heads_first, unlay=_back)]
    if shape.prefix is None:
        # FASTLLM_ATTENTION=varlen:FA3 has them serve for us.
        goals = {way: Rate(best) for way, best in shape.best.items()}
        found.append(Contender("varlen_attn", varlen, prepare=_varlen_inputs))
        found += [
            Contender(name, varlen, prepare=_varlen_inputs, goals=goals, around=_activated(name))
            for name in _flash_versions()
        ]
    if shape.prefix is None and shape.window is None and len(set(shape.lengths)) == 1:
        count = len(shape.lengths)

        def lay(t: Tensor) -> Tensor:
            return t.unflatten(0, (count, -1)).transpose(1, 2).contiguous()

        def unlay(t: Tensor) -> Tensor:
            return t.transpose(1, 2).flatten(0, 1)

        def prepare(inputs: Inputs) -> Inputs:
            return {name: lay(inputs[name]) for name in ("q", "k", "v")}

        found += [
            Contender(
                name,
                sdpa if grouped else sdpa_repeated,
                prepare=prepare,
                lay=lay,
                unlay=unlay,
                around=_only(backend),
            )
            for name, (backend, grouped) in BACKENDS.items()
        ]
    return found


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, on [B, H, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sdpa_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with each key head once for each of its query heads, as models do it."""
    share = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(share, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _only(backend: str) -> Any:
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            yield

    return around


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None].contiguous()


def _back(tensor: Tensor) -> Tensor:
    return tensor[0].transpose(0, 1)


# -- flex_attention --------------------------------------------------------------------------------


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """With the layout as a block mask, which is made beforehand."""
    return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)


_made: list[Any] = []


def _compiled_flex() -> Any:
    if not _made:
        from torch.nn.attention.flex_attention import flex_attention

        _made.append(torch.compile(flex_attention, dynamic=False))
    return _made[0]


def _flex_inputs(inputs: Inputs) -> Inputs:
    if inputs["q"].device.type != "cuda":
        raise NotImplementedError("the compiled form is for a GPU")
    given = {name: _heads_first(inputs[name]) for name in ("q", "k", "v")}
    return given | {"mask": flex_mask(inputs["layout"], inputs["window"])}


def flex_mask(layout: PackedLayout, window: int | None) -> Any:
    """The layout as flex_attention has it: what each query may see, by tokens and by blocks."""
    if "flex mask" in layout.__dict__:
        return layout.__dict__["flex mask"]
    from torch.nn.attention.flex_attention import create_block_mask

    segment, prefix, position = layout.segments, layout.prefix, layout.positions
    before = prefix[segment.long()]

    def visible(_b: Any, _h: Any, query: Any, key: Any) -> Any:
        same = segment[query] == segment[key]
        shared = before[query] == segment[key]
        distance = position[query] - position[key]
        near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return (same | shared) & near

    length = layout.total_tokens
    mask = create_block_mask(visible, None, None, length, length, device=str(layout.device))
    layout.__dict__["flex mask"] = mask
    return mask


# -- varlen_attn -----------------------------------------------------------------------------------


def varlen(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, options: dict[str, Any]
) -> Tensor:
    """PyTorch's packed attention, which knows no shared prompts."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, starts, starts, longest, longest, **options)


def _varlen_inputs(inputs: Inputs) -> Inputs:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    if inputs["q"].device.type != "cuda":
        raise NotImplementedError("it is for a GPU")
    layout, window = inputs["layout"], inputs["window"]
    if max(layout.prefix_of) != NO_PREFIX:
        raise NotImplementedError("it has no shared prompts")
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise NotImplementedError("this version has no windows")
    if "enable_gqa" in known:
        options["enable_gqa"] = inputs["q"].shape[1] != inputs["k"].shape[1]
    return {name: inputs[name] for name in ("q", "k", "v")} | {
        "starts": layout.starts,
        "longest": max(layout.lengths),
        "options": options,
    }


def _flash_versions() -> list[str]:
    """FA3 and FA4, where this PyTorch knows them; activating one that is not installed fails."""
    import torch.nn.attention as attention

    known = getattr(attention, "list_flash_attention_impls", list)()
    return [f"varlen_attn {name}" for name in known]


def _activated(contender: str) -> Any:
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        import torch.nn.attention as attention

        attention.activate_flash_attention_impl(contender.removeprefix("varlen_attn "))
        try:
            yield
        finally:
            attention.restore_flash_attention_impl()

    return around
