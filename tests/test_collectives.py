"""What the compiled train step sends over a data x fsdp x tensor mesh, collective by collective."""

import re
from collections import defaultdict
from typing import NamedTuple

import jax
import pytest
from tiny import tiny_train

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.train.program import abstract_batch, abstract_state, build

KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
# Devices 0..7 of a mesh 2 x 2 x 2: the other one of device 0's group.
AXIS_OF = {"{0,4}": "data", "{0,2}": "fsdp", "{0,1}": "tensor"}


class Collective(NamedTuple):
    kind: str
    axis: str
    size: int  # bytes of the result on one device; of a tuple the sum

    @property
    def sent(self) -> float:
        """Bytes that a device of a group of two sends: half of what is gathered, or as much as is
        left of what is scattered; a sum costs both."""
        return {"all-gather": 0.5, "reduce-scatter": 1.0, "all-reduce": 1.0}[self.kind] * self.size


def collectives(text: str) -> dict[str, list[Collective]]:
    """The collectives of a compiled program by where they stand: "forward" and "backward" (the
    loops over layers) and "once"."""
    found = defaultdict(list)
    for line in text.splitlines():
        match = re.search(rf" = (\(.*?\)|\S+) ({KINDS})(?:-start)?\(", line)
        if not match:
            continue
        size = 0
        for dims in re.findall(r"f32\[([\d,]*)\]", match.group(1)):
            n = 4
            for d in filter(None, dims.split(",")):
                n *= int(d)
            size += n
        name = re.search(r'op_name="([^"]*)"', line).group(1)
        where = "once"
        if "while/body" in name and "head" not in name:
            where = "backward" if "transpose" in name else "forward"
        group = re.search(r"replica_groups=\{(\{[\d,]*\})", line)
        axis = AXIS_OF.get(group.group(1), "several") if group else "several"
        found[where].append(Collective(match.group(2), axis, size))
    return found


def step_collectives(mesh: dict, **changes) -> dict[str, list[Collective]]:
    cfg = tiny_train(
        **{"model.scan": True, "model.n_layers": 4, "data.isolate_documents": False, **changes}
    )
    mesh = sharding.make_mesh(MeshConfig(**mesh))
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        lowered = program.step.lower(abstract_state(program), abstract_batch(cfg, mesh))
    return collectives(lowered.compile().as_text())


# One layer: d_model 32, heads 8 x 4, d_ff 64, 16 rows of 16 tokens, float32.
MATRICES = 4 * (4 * 32 * 32 + 3 * 32 * 64)  # bytes of the seven matrices
STREAM = 4 * (16 // 4) * 16 * 32  # bytes of the residual stream of a data x fsdp shard's rows
SCALES = 2 * 4 * 2 * 32  # bytes of the two norms' gradients, summed over rows, then over lengths


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_layer_sends_exactly_the_least(remat):
    """Counts by kind and axis, and bytes against the formula. Rematerialisation repeats the forward
    pass's gathers of the stream and its scatter after attention, and no gather of a matrix."""
    found = step_collectives({"data": 2, "fsdp": 2, "tensor": 2}, **{"model.remat": remat})

    def count(where, kind, axis):
        return sum(c.kind == kind and c.axis == axis for c in found[where])

    assert count("forward", "all-gather", "fsdp") == 7
    assert count("forward", "all-gather", "tensor") == 2
    assert count("forward", "reduce-scatter", "tensor") == 2
    assert len(found["forward"]) == 11  # and nothing else

    again = 1 if remat == "full" else 0
    assert count("backward", "all-gather", "fsdp") == 7  # not kept from the forward pass
    assert count("backward", "reduce-scatter", "fsdp") == 7  # an all-reduce would send twice that
    assert count("backward", "all-gather", "tensor") == 2 + 2 * again
    assert count("backward", "reduce-scatter", "tensor") == 2 + again
    sums = [c for c in found["backward"] if c.kind == "all-reduce"]
    assert sum(c.size for c in sums if c.axis == "data") == MATRICES / 4  # scattered, cut in two
    assert sum(c.size for c in sums if c.axis != "data") == SCALES
    assert len(found["backward"]) == 18 + 3 * again + len(sums)

    mine = MATRICES / 2  # of a matrix's two halves over "tensor"
    matrices = mine / 2 * 3 + mine / 2  # two gathers and a scatter over fsdp, a sum over data
    stream = STREAM / 2 * (8 + 3 * again)
    sent = sum(c.sent for where in ("forward", "backward") for c in found[where])
    assert sent == matrices + stream + SCALES


def test_outside_the_layers_only_the_table_and_the_stream_move():
    found = step_collectives({"data": 2, "fsdp": 2, "tensor": 2})["once"]
    table = 4 * 56 // 2 * 32  # the half of 56 rows that a tensor shard has
    for c in found:
        assert c.kind in ("all-gather", "reduce-scatter", "all-reduce")
        assert c.size <= max(table, STREAM)
    assert sum(c.size for c in found if c.kind == "all-gather") <= 2 * table + 2 * STREAM
    gradients = [c for c in found if c.kind == "reduce-scatter" and c.axis == "fsdp"]
    assert [c.size for c in gradients] == [table / 2, table / 2]  # of the embedding, of the head


def test_data_parallel_sends_gradients_and_nothing_else():
    found = step_collectives({"data": 8})
    assert not found["forward"]
    assert {c.kind for c in found["backward"]} == {"all-reduce"}
    assert sum(c.size for c in found["backward"]) in (MATRICES + SCALES, MATRICES + SCALES / 2)
