"""The picture of who holds what: blocks and devices as the shardings say."""

import jax
import pytest

from paxlike import parallel
from paxlike.plan import picture


def array(mesh, shape, names):
    with parallel.activate(mesh):
        return picture.Array("x", shape, parallel.named_sharding(mesh, names), 4)


@pytest.fixture(scope="module")
def mesh():
    return parallel.Mesh(ici=(1, 2, 2)).build(jax.devices()[:4])


def test_two_dimensions_over_two_axes(mesh):
    parts, shown, hidden = picture.parts_of(array(mesh, (8, 4, 6), (None, "embed", "mlp")))
    assert shown == (1, 2) and not hidden
    found = {(p.left, p.bottom): p.devices for p in parts}
    # Rows from the top: fsdp; columns: tensor.
    assert found == {(0, 0.5): (0,), (0.5, 0.5): (1,), (0, 0): (2,), (0.5, 0): (3,)}


def test_copies_are_one_block_with_all_that_hold_it(mesh):
    parts, shown, _ = picture.parts_of(array(mesh, (4, 6), ("embed", None)))
    assert shown == (0, 1)
    assert {p.bottom: p.devices for p in parts} == {0.5: (0, 1), 0.0: (2, 3)}
    parts, *_ = picture.parts_of(array(mesh, (6, 2), (None, None)))
    assert [p.devices for p in parts] == [(0, 1, 2, 3)]


def test_a_third_cut_is_named():
    mesh = parallel.Mesh(ici=(2, 2, 1), axes=("pipeline", "fsdp", "tensor")).build(
        jax.devices()[:4]
    )
    one = array(mesh, (4, 8, 6), ("layers", "embed", "mlp"))
    assert picture.parts_of(one)[1:] == ((0, 1), {})
    three = parallel.Mesh(ici=(2, 1, 2), axes=("pipeline", "fsdp", "tensor"))
    wide = array(three.build(jax.devices()[:4]), (4, 8, 6), ("layers", "embed", "mlp"))
    assert picture.parts_of(wide)[1:] == ((0, 2), {})


@pytest.mark.parametrize(
    ("devices", "text"), [((0, 1, 2, 3), "all"), ((0, 2), "0 2"), ((0, 1, 3), "0-1 3")]
)
def test_devices_in_short(devices, text):
    assert picture._devices(devices, 4) == text


def test_a_picture_is_written_and_too_many_devices_are_refused(mesh, tmp_path):
    path = tmp_path / "new" / "x.png"
    picture.draw([array(mesh, (8, 4), ("embed", "mlp"))], mesh, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")

    class Large:
        size = 64

    with pytest.raises(ValueError, match="at most 32 devices and the mesh has 64"):
        picture.draw([], Large(), "title", path)
