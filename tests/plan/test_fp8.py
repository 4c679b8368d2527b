"""FP8 products: those that a step asks for, and those that a compiler made."""

import copy
import json
import types

import jax
import pytest
import tiny
from plan.test_command import installed, plan

from paxlike import parallel
from paxlike.layers.lora import TRAINABLE, Lora
from paxlike.layers.moe import MoE, Router
from paxlike.ops import grouped
from paxlike.ops.fp8 import Fp8
from paxlike.plan import fp8, hlo
from paxlike.train.state import StateFactory
from paxlike.train.step import TrainStep

LAYERS = 3


def traced(*, adapters=None, opt=None, experts=0, capacity=1.0, **options):
    """The step of a tiny GPT in FP8, traced; the feed-forward layers may be of so many experts."""
    net = tiny.model(**{"layers": LAYERS, "width": 32, **options})
    (block,) = net.stack.period
    mixer = block.mixer.clone(dot_general_cls=Fp8(), adapters=adapters)
    ffn = block.ffn.clone(dot_general_cls=Fp8())
    if experts:
        router = Router(capacity_factor=capacity)
        ffn = MoE(experts, 64, router, gated=True, dot_general_cls=Fp8(), use_bias=False)
    block = block.clone(mixer=mixer, ffn=ffn)
    net = net.clone(stack=net.stack.clone(period=(block,)))
    mesh = parallel.Mesh(ici=(1, 1, 1)).build(jax.devices()[:1])
    with parallel.activate(mesh):
        (batch,) = tiny.batches(1)
        spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
        factory = StateFactory(net, opt or tiny.optimizer(), spec, mesh)
        step = TrainStep.of(factory, tiny.CausalLanguage())
        return jax.jit(lambda state, batch: step(state, batch)).trace(factory.abstract(), spec)


@pytest.mark.parametrize(
    "options",
    [{"remat": "SAVE_NOTHING"}, {"remat": "SAVE_EVERYTHING"}, {"scan": False}],
    ids=str,
)
def test_three_products_for_each_weight_and_layer(options):
    asked = fp8.asked_for(traced(**options))
    assert asked.total() == 3 * 4 * LAYERS
    assert set(asked.values()) == {LAYERS}
    kinds = {kind for layer, kind in asked if layer.endswith("period_0/mixer/qkv")}
    assert kinds == {"forward", "input_grad", "weight_grad"}


@pytest.mark.parametrize("capacity", [1.0, None])
def test_the_experts_of_a_layer_are_one_weight(capacity, monkeypatch):
    if capacity is None:  # as on a GPU, where the number of turns is known, and is not the count

        def over(blocks, n, share, body, start):
            return jax.lax.fori_loop(0, blocks.limit, body, start)

        monkeypatch.setattr(grouped, "_over", over)
    asked = fp8.asked_for(traced(experts=4, capacity=capacity))
    assert asked.total() == 3 * 5 * LAYERS
    kinds = {kind for layer, kind in asked if layer.endswith("period_0/ffn/gate")}
    assert kinds == {"forward", "input_grad", "weight_grad"}


def test_frozen_weights_have_two():
    lora = Lora(rank=2)
    asked = fp8.asked_for(
        traced(adapters={"qkv": lora, "out": lora}, opt=tiny.optimizer(trainable=TRAINABLE))
    )
    assert {kind for _, kind in asked} == {"forward", "input_grad"}


def test_a_compiler_that_falls_back_is_caught():
    """XLA's CPU compiler widens all of them."""
    step = traced()
    products = fp8.count(step, hlo.parse(step.lower().compile().as_text()))
    assert (products.expected, products.found) == (36, 0)
    assert len(products.missing) == 4
    assert "stack/layers/period_0/ffn/ffn2 (9)" in products.line()
    assert "\n" not in products.line()


PROGRAM = """HloModule jit_step, is_scheduled=true

%dots (a: f8e4m3fn[16,16], b: f8e5m2[16,16]) -> bf16[16,16] {
  %a = f8e4m3fn[16,16]{1,0} parameter(0)
  %b = f8e5m2[16,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[16,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/stack/while/body/ffn/fp8/fp8_weight_grad/dot_general"}
}

%block (p.2: f8e4m3fn[16,16]) -> f8e4m3fn[16,16] {
  %p.2 = f8e4m3fn[16,16]{1,0} parameter(0)
  %gemm.2 = (bf16[16,16]{1,0}, s8[64]{0}) custom-call(%p.2, %p.2), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(step)/stack/while/body/ffn/ffn1/fp8_forward/while/body/dot_general"}
  ROOT %r.2 = f8e4m3fn[16,16]{1,0} copy(%p.2)
}

%wide_block (p.3: f8e4m3fn[16,16]) -> f8e4m3fn[16,16] {
  %p.3 = f8e4m3fn[16,16]{1,0} parameter(0)
  %w.3 = bf16[16,16]{1,0} convert(%p.3)
  %gemm.3 = (bf16[16,16]{1,0}, s8[64]{0}) custom-call(%w.3, %w.3), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/stack/while/body/ffn/gate/fp8_input_grad/while/body/dot_general"}
  ROOT %r.3 = f8e4m3fn[16,16]{1,0} copy(%p.3)
}

%body (p: f8e4m3fn[16,16]) -> f8e4m3fn[16,16] {
  %p = f8e4m3fn[16,16]{1,0} parameter(0)
  %q = f8e5m2[16,16]{1,0} constant({...})
  %w = bf16[16,16]{1,0} constant({...})
  %gemm = (bf16[16,16]{1,0}, s8[64]{0}) custom-call(%p, %p), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(step)/stack/while/body/closed_call/ffn/ffn._product/fp8/fp8_forward/dot_general"}
  %triton = bf16[16,16]{1,0} fusion(%p, %q), kind=kCustom, calls=%dots
  %wide = (bf16[16,16]{1,0}, s8[64]{0}) custom-call(%w, %w), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/stack/while/body/ffn/fp8/fp8_input_grad/dot_general"}
  %blocks = f8e4m3fn[16,16]{1,0} while(%p), condition=%condition, body=%block, metadata={op_name="jit(step)/stack/while/body/ffn/gate/fp8_forward/while"}, backend_config={"known_trip_count":{"n":"9"}}
  %wide_blocks = f8e4m3fn[16,16]{1,0} while(%p), condition=%condition, body=%wide_block, metadata={op_name="jit(step)/stack/while/body/ffn/gate/fp8_input_grad/while"}, backend_config={"known_trip_count":{"n":"9"}}
  ROOT %r = f8e4m3fn[16,16]{1,0} copy(%p)
}

%condition (p.1: f8e4m3fn[16,16]) -> pred[] {
  %p.1 = f8e4m3fn[16,16]{1,0} parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: f8e4m3fn[16,16]) -> f8e4m3fn[16,16] {
  %x = f8e4m3fn[16,16]{1,0} parameter(0)
  ROOT %loop = f8e4m3fn[16,16]{1,0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_calls_and_fusions_are_found_in_loops_and_wide_ones_are_not():
    made = fp8.made(hlo.parse(PROGRAM))
    # A loop over blocks, in a scan over five layers, counts once, under its own name.
    assert made.pop(("stack/ffn/gate", "forward")) == 5
    assert made == {("stack/ffn", "forward"): 5, ("stack/ffn", "weight_grad"): 5}
    kinds = ("forward", "input_grad", "weight_grad")
    expected = fp8.Counter({("stack/ffn", kind): 5 for kind in kinds})
    products = fp8.compare(expected, made)
    assert products == fp8.Products(15, 10, {"stack/ffn": 5})
    # What is found twice, as it is recomputed, counts once.
    twice = fp8.compare(fp8.Counter({("stack/ffn", "forward"): 2}), copy.copy(made))
    assert twice.line() == "FP8 products: 2 of 2"


def test_a_run_on_a_gpu_says_what_it_found(monkeypatch):
    """The start of a run reads its own program, where that is a GPU's."""
    from paxlike.experiment import Experiment
    from paxlike.ops import platform

    step = traced()
    compiled = types.SimpleNamespace(as_text=lambda: PROGRAM)
    assert Experiment.fp8_products(None, step, compiled) is None
    monkeypatch.setattr(platform, "is_nvidia", lambda: True)
    assert Experiment.fp8_products(None, step, compiled).found == 0


@pytest.mark.skipif(
    not installed("jax-cuda13-plugin", "jax-cuda12-plugin"),
    reason="needs the GPU compiler: requirements/plan.txt",
)
@pytest.mark.parametrize(
    ("config", "layers", "products"),
    [("Synthetic126M", {"NUM_LAYERS": 3}, 36), ("Mixtral8x7B", {"NUM_KV_HEADS": 2}, 42)],
)
def test_the_program_for_h100_multiplies_in_fp8(config, layers, products, tmp_path):
    done = plan(
        "--chip=h100",
        f"--job_log_dir={tmp_path}",
        config=config,
        USE_FP8=True,
        **layers,
        CHECKPOINT_POLICY="SAVE_NOTHING",
        ICI_MESH_SHAPE="[1,2,2]",
        DCN_MESH_SHAPE="[1,1,1]",
    )
    assert f"\nFP8 products: {products} of {products}\n" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())["fp8"]
    assert found == {"expected": products, "found": products, "missing": {}}


@pytest.mark.skipif(
    not installed("jax-cuda13-plugin", "jax-cuda12-plugin"),
    reason="needs the GPU compiler: requirements/plan.txt",
)
def test_a_chip_without_it_is_refused():
    mesh = {"ICI_MESH_SHAPE": "[1,1,1]", "DCN_MESH_SHAPE": "[1,1,1]"}
    done = plan("--chip=a100", expect=2, USE_FP8=True, **mesh)
    assert "compute capability 8.9 or above" in done.stderr.strip().splitlines()[-1]
