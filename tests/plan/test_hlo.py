"""The reader of compiled programs, on texts written by hand."""

import pathlib

import pytest

from paxlike.plan import hlo
from paxlike.plan.cost import products, traffic
from paxlike.plan.hlo import replica_groups

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def module():
    return hlo.parse((HERE / "cpu_step.hlo").read_text())


def test_loops_multiply_and_a_start_with_its_done_is_one(module):
    found = {c.name: (c.kind, c.bytes, times) for c, times in module.collectives()}
    assert found == {
        "gather-start": ("all-gather", 2 * 8 * 4 * 4, 6),
        "reduced": ("all-reduce", 8 * 4 * 4, 6),
        "scatter-start": ("reduce-scatter", 8 * 4 * 4, 1),
        "moved": ("collective-permute", 8 * 4 * 4, 1),
    }
    assert [c.name for c, _ in module.collectives() if c.is_async] == [
        "gather-start",
        "scatter-start",
    ]
    assert module.unknown_loops == []


def test_groups_tell_the_mesh_axes(module):
    shape = {"data": 2, "fsdp": 1, "tensor": 2}
    axes = {c.name: c.axes(shape) for c, _ in module.collectives()}
    assert axes == {
        "gather-start": ("tensor",),
        "reduced": ("data",),
        "scatter-start": ("data",),
        "moved": ("tensor",),
    }
    assert {c.axes({"all": 4}) for c, _ in module.collectives()} == {("all",)}


def test_what_a_ring_sends():
    groups = (tuple(range(4)),)
    sent = {
        kind: hlo.Collective("c", kind, 1000, groups).sent_bytes
        for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    }
    assert sent == {
        "all-gather": 750,
        "reduce-scatter": 750,
        "all-reduce": 1500,
        "all-to-all": 750,
    }


def test_a_ragged_exchange_counts_its_rows_once():
    module = hlo.parse("""HloModule m, num_partitions=4
ENTRY %main (rows: f32[18,4], room: f32[48,4], n: s64[4]) -> f32[48,4] {
  %rows = f32[18,4]{1,0} parameter(0)
  %room = f32[48,4]{1,0} parameter(1)
  %n = s64[4]{0} parameter(2)
  %start = ((f32[18,4]{1,0}, f32[48,4]{1,0}, s64[4]{0}, s64[4]{0}, s64[4]{0}, /*index=5*/s64[4]{0}), f32[48,4]{1,0}) \
ragged-all-to-all-start(%rows, %room, %n, %n, %n, /*index=5*/%n), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %done = f32[48,4]{1,0} ragged-all-to-all-done(%start)
}
""")
    ((found, times),) = module.collectives()
    assert (found.kind, found.bytes, times) == ("ragged-all-to-all", 18 * 4 * 4, 1)
    assert found.sent_bytes == 18 * 4 * 4 * 3 // 4


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x={}", ((0, 1), (2, 3))),
        ("replica_groups=[1,4]<=[4]", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("channel_id=1", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", ((0, 2, 1, 3),)),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ],
)
def test_notations_of_groups(text, groups):
    assert replica_groups(text, 4) == groups


def test_products_and_traffic(module):
    body = module.computations["body"]
    dot = body.instructions["y"]
    assert [p.flops for p in products(module, dot, body)] == [2 * 8 * 8 * 4]
    assert traffic(module, dot, body) == 4 * (8 * 4 + 8 * 4 + 8 * 8)
    # Of the stacked array only the slice that is written counts; the other inputs are its value and an index.
    update = body.instructions["kept"]
    assert traffic(module, update, body) == 4 * (8 * 4) + 4 + 4 * (8 * 4)
    assert traffic(module, body.instructions["x"], body) == 0


def test_products_of_the_libraries_of_a_gpu():
    module = hlo.parse((HERE / "gpu_products.hlo").read_text())
    entry = module.computations["main"]
    (gemm,) = products(module, entry.instructions["p"], entry)
    assert gemm.flops == 2 * (4 * 16 * 32) * 8 and gemm.dtype == "bfloat16" and not gemm.fused
    (fused,) = products(module, entry.instructions["f"], entry)
    assert fused.flops == 4 * (2 * 4 * 64 * 64) * 16 // 2 and fused.fused


def test_what_begins_and_ends_apart_moves_what_it_moves_otherwise():
    module = hlo.parse((HERE / "gpu_products.hlo").read_text())
    entry = module.computations["main"]
    moved = {
        name: traffic(module, entry.instructions[name], entry)
        for name in ("beside", "written", "moving")
    }
    slice_bytes = 4 * 8 * 4
    assert moved == {"beside": 2 * slice_bytes + 4, "written": 0, "moving": 2 * slice_bytes + 4}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_f {}")
