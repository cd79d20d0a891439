"""Named tensors in safetensors files: one file, or shards and an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import read_json_object, replacing, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_file(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, into memory of its own.

    Raises:
        ValueError: no safetensors file, or one that is cut short.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # The tensors may be views of the mapped file: a copy survives its being replaced.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def write_file(path: Path, tensors: Mapping[str, Tensor], durable: bool = True) -> None:
    """Write tensors as one safetensors file; `durable` waits until it is on the disk."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path, durable) as beside:
        save_file(plain, str(beside), metadata={"format": "pt"})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read a model folder's weights: `model.safetensors`, or the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return read_file(folder / WEIGHTS)
    weight_map = _weight_map(folder / INDEX)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise ValueError(f"{folder / INDEX}: its shard {shard} is not there")
        tensors |= read_file(folder / shard)
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise ValueError(f"{folder / INDEX}: no shard holds {', '.join(lost[:5])}")
    return tensors


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int) -> None:
    """Write a model folder's weights, cut into shards of at most `max_shard_size` bytes.

    Weights of an earlier save under other file names are removed afterwards.
    """
    shards = _shards(tensors, max_shard_size)
    old = set(_old_shards(folder))
    if len(shards) == 1:
        write_file(folder / WEIGHTS, tensors)
        (folder / INDEX).unlink(missing_ok=True)
        names = [WEIGHTS]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            write_file(folder / name, shard)
        write_json(folder / INDEX, _index(names, shards))
        (folder / WEIGHTS).unlink(missing_ok=True)
    for name in old - set(names):
        (folder / name).unlink(missing_ok=True)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _index(names: list[str], shards: list[dict[str, Tensor]]) -> dict[str, Any]:
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    return {"metadata": {"total_size": total}, "weight_map": places}


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensor to file; a file anywhere but beside the index is refused."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected an object 'weight_map', found {weight_map!r:.50}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _is_bare(shard):
            raise ValueError(
                f"{index}: a shard must be a .safetensors file beside the index, found {shard!r}"
            )
    return weight_map


def _is_bare(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def _old_shards(folder: Path) -> list[str]:
    names = [path.name for path in folder.glob("model-*-of-*.safetensors")]
    return [*names, WEIGHTS] if (folder / WEIGHTS).exists() else names
