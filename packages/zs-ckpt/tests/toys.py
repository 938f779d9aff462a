"""Shardables for tests: named tensors cut by dim 0, by flat ranges or not at all, over the ranks of a group."""

import torch
from zs_ckpt import Piece, TensorSpec
from zs_ckpt.boxes import boxes_of_range, numel, shape_of, whole


def value(name, shape, dtype=torch.float32):
    """The whole tensor of that name, the same in every process."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def rows(shape, rank, world, weights=None):
    """This rank's part by dim 0, uneven by `weights`."""
    weights = weights or [1] * world
    edges = [shape[0] * sum(weights[:k]) // sum(weights) for k in range(world + 1)]
    box = ((edges[rank], edges[rank + 1]), *whole(shape[1:]))
    return [box] if numel(box) else []


def flat(shape, rank, world, padding=0):
    """This rank's part of the flattened tensor."""
    size = torch.Size(shape).numel() + padding
    share = -(-size // world)
    limit = torch.Size(shape).numel()
    return list(boxes_of_range(shape, min(rank * share, limit), min((rank + 1) * share, limit)))


def columns(shape, rank, world):
    start, stop = shape[-1] * rank // world, shape[-1] * (rank + 1) // world
    return [(*whole(shape[:-1]), (start, stop))] if stop > start else []


def cut(how, shape, rank, world):
    """(boxes, replica, replicas) of this rank."""
    if how == "copy" or 0 in shape or not shape:
        return [whole(shape)], rank, world
    if how == "pairs":  # two replicas of each half (an even world)
        return rows(shape, rank // 2, world // 2), rank % 2, 2
    boxes = {"rows": rows, "flat": flat, "columns": columns}[how](shape, rank, world)
    return boxes, 0, 1


def part(tensor, box):
    return tensor[tuple(slice(*pair) for pair in box)].contiguous()


class Sharded:
    """`tensors`: name -> (shape, dtype); `hows`: name -> how it is cut."""

    PROTOCOL = 1

    def __init__(self, rank, world, tensors, how="rows", own=0, seed=0, objects=None):
        self.rank, self.world, self.tensors, self.how = rank, world, dict(tensors), how
        self.own, self.state, self.finished = own, objects or {"steps": 3}, None
        self.seed, self.filled, self.rank_saved = seed, {}, None

    def boxes(self, name):
        how = self.how if isinstance(self.how, str) else self.how[name]
        return cut(how, self.tensors[name][0], self.rank, self.world)

    def pieces(self):
        for name, (shape, dtype) in self.tensors.items():
            boxes, replica, replicas = self.boxes(name)
            for box in boxes:
                data = part(value(f"{name}{self.seed}", shape, dtype), box)
                yield Piece(TensorSpec(name, shape, dtype), box, data, replica, replicas)
        if self.own:
            data = torch.full((self.own,), float(self.rank + 1))
            yield Piece(TensorSpec("mine", (self.own,), data.dtype), ((0, self.own),), data, scope="rank")

    def objects(self):
        return self.state

    def rank_objects(self):
        return {"rank": self.rank}

    def take_rank_objects(self, saved):
        self.rank_saved = saved

    def places(self, saved, objects):
        self.saved = saved
        for name, (shape, dtype) in self.tensors.items():
            boxes, _, _ = self.boxes(name)
            for box in boxes:
                data = torch.zeros(shape_of(box), dtype=dtype)
                self.filled[name, box] = data
                yield Piece(TensorSpec(name, shape, dtype), box, data)
        if self.own and "mine" in saved:
            self.filled["mine"] = torch.zeros(self.own)
            yield Piece(saved["mine"], ((0, self.own),), self.filled["mine"], scope="rank")

    def finish(self, objects):
        self.finished = objects

    def check(self, seed=None, stored=None):
        """Every place has what `pieces` of `seed` has there."""
        seed = self.seed if seed is None else seed
        for key, data in self.filled.items():
            if key == "mine":
                expected = torch.full((self.own,), float(self.rank + 1))
            else:
                name, box = key
                shape, dtype = self.tensors[name]
                expected = part(value(f"{name}{seed}", shape, (stored or {}).get(name, dtype)), box).to(dtype)
            assert torch.equal(data, expected), (key, data, expected)
        return sum(data.nbytes for data in self.filled.values())
