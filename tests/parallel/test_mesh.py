"""Mesh shapes: sizes, batches, refusals, and where devices of several nodes land."""

import dataclasses

import jax
import numpy as np
import pytest

from paxlike import parallel
from paxlike.parallel.mesh import Mesh


def test_shape_is_the_elementwise_product():
    mesh = Mesh(ici=(1, 8, 1), dcn=(2, 32, 1))
    assert mesh.shape == {"data": 2, "fsdp": 256, "tensor": 1}
    assert mesh.num_devices == 512 and mesh.num_batch_shards == 512


@pytest.mark.parametrize(
    ("percore", "shape", "rows"),
    [
        (4, (4, 1, 1), 16),
        (0.5, (1, 2, 2), 2),
        (0.25, (1, 1, 4), 1),
        (6, (1, 4, 1), 24),
        (1 / 3, (1, 1, 3), 1),
    ],
)
def test_global_batch_is_rows_per_device_times_devices(percore, shape, rows):
    assert Mesh(ici=shape).global_batch_size(percore) == rows


@pytest.mark.parametrize(
    ("percore", "shape", "message"),
    [
        (
            0.5,
            (4, 1, 1),
            r"PERCORE_BATCH_SIZE=0.5 x 4 devices = 2 rows .* data x fsdp = 4; .*PERCORE_BATCH_SIZE=1 \(4 rows\)",
        ),
        (0.3, (2, 1, 2), r"= 1.2 rows .* data x fsdp = 2; .*PERCORE_BATCH_SIZE=0.5 \(2 rows\)"),
        (0, (1, 1, 1), r"= 0 rows"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(percore, shape, message):
    with pytest.raises(ValueError, match=message) as error:
        Mesh(ici=shape).global_batch_size(percore)
    assert "\n" not in str(error.value)


def test_wrong_number_of_devices_names_the_nearest_mesh():
    with pytest.raises(
        ValueError, match=r"needs 64 devices .* there are 4; .*ICI_MESH_SHAPE=\[4, 1, 1\]"
    ):
        Mesh(ici=(8, 1, 1), dcn=(8, 1, 1)).build()
    with pytest.raises(ValueError, match=r"needs 8 devices .*ICI_MESH_SHAPE=\[1, 2, 2\]"):
        Mesh(ici=(1, 4, 2)).build()


def test_minus_one_takes_the_devices_that_are_left():
    assert Mesh(ici=(-1, 1, 2)).resolve(8).ici == (4, 1, 2)
    assert Mesh(ici=(1, -1, 1), dcn=(2, 1, 1)).resolve(8).shape == {
        "data": 2,
        "fsdp": 4,
        "tensor": 1,
    }
    with pytest.raises(ValueError, match="4 devices do not divide by 3"):
        Mesh(ici=(-1, 3, 1)).resolve(4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ici": (1, 1)}, r"need one entry for each of the axes \['data', 'fsdp', 'tensor'\]"),
        ({"ici": (0, 1, 1)}, "at least 1"),
        ({"ici": (-1, -1, 1)}, "at least 1"),
        ({"ici": (1, 1, 1), "dcn": (1, -1, 1)}, "at least 1"),
        ({"ici": (2, 2, 1), "axes": ("data", "data", "tensor")}, "names an axis twice: .* as in"),
    ],
)
def test_bad_shapes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Mesh(**kwargs)


@dataclasses.dataclass(frozen=True)
class Device:
    """The two facts of a device that the layout uses. (Several nodes are not to be had in one process.)"""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"


def test_nodes_are_recognised_and_dcn_axes_go_across_them():
    from paxlike.parallel.mesh import _device_array, _nodes

    # Two nodes of four devices, two processes each, listed out of order.
    devices = [Device(i, i // 2, i // 4) for i in (5, 1, 7, 3, 0, 6, 2, 4)]
    nodes = _nodes(devices)
    assert [[d.id for d in node] for node in nodes] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    inside = np.stack([_device_array((1, 2, 2), node) for node in nodes])
    assert inside.shape == (2, 1, 2, 2)


def test_one_node_may_hold_a_dcn_shape():
    mesh = Mesh(ici=(1, 2, 1), dcn=(2, 1, 1)).build()
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_rules_give_specs_and_refuse_collisions():
    mesh = Mesh(ici=(1, 2, 2)).build()
    with parallel.activate(mesh):
        assert parallel.spec("layers", "embed", "mlp") == jax.sharding.PartitionSpec(
            None, "fsdp", "tensor"
        )
        assert parallel.spec("batch", "length") == jax.sharding.PartitionSpec("fsdp", None)
        assert parallel.num_shards("batch") == 2
        with pytest.raises(
            ValueError, match="'mlp' and 'vocab' of one array are both on the mesh axis 'tensor'"
        ):
            parallel.spec("mlp", "vocab")
        with pytest.raises(ValueError, match="no rule for the logical axis 'emebd'"):
            parallel.spec("emebd")
    assert parallel.num_shards("batch") == 1, "outside a mesh nothing is sharded"


def test_shard_refuses_a_wrong_number_of_names():
    with pytest.raises(ValueError, match="cannot have the 2 axis names"):
        parallel.shard(jax.numpy.zeros((2, 3, 4)), "batch", "length")


def test_what_does_not_divide_is_named_with_a_size_that_fits():
    with pytest.raises(
        ValueError,
        match=r"x: its dimension 'heads' = 12 does not divide over the mesh axis tensor = 8; use tensor = 4",
    ):
        parallel.check_divisible(("embed", "heads"), (768, 12), {"tensor": 8}, "x")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"replica": 2, "fsdp": 1},
            r"nothing is spread over the axis 'replica'; .*; did you mean data\?",
        ),
        (
            {"data": 2, "vocab": 2},
            "'vocab'; the axes are context, data, expert, fsdp, pipeline, tensor",
        ),
        ({"dat": 1, "fsdp": 2}, r"'dat'; .*; did you mean data\?"),
    ],
)
def test_an_axis_that_nothing_is_spread_over_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        parallel.check_axes(sizes)
    parallel.check_axes({"data": 2, "expert": 2, "fsdp": 1})


def test_axes_move_one_by_one_to_the_dimension_that_counts_parts():
    mesh = parallel.Mesh(ici=(1, 2, 2)).build(jax.devices()[:4])
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    path = parallel.towards(place(None, "fsdp", "tensor"), (4, 8, 6), 0)
    assert [p.spec for p in path] == [
        place(None, "fsdp", "tensor").spec,
        place("fsdp", None, "tensor").spec,
        place(("fsdp", "tensor"), None, None).spec,
    ]
    # Three parts do not go over two devices, six go over one of two axes, and a free axis takes its share.
    assert parallel.towards(place(None, "fsdp"), (3, 8), 0) == [place(None, "fsdp")]
    both = parallel.towards(place(None, "fsdp"), (4, 8), 0)
    assert both[-1].spec == place(("fsdp", "tensor"), None).spec
    halfway = parallel.towards(place(None, "fsdp", "tensor"), (6, 8, 8), 0)
    assert halfway[-1].spec == place("fsdp", None, "tensor").spec
