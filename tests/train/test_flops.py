"""The FLOPs that MFU is made of: counted from shapes, beside a formula and XLA's own count."""

import jax
import pytest
import tiny

from paxlike import parallel
from paxlike.log.flops import train_flops
from paxlike.ops import attention
from paxlike.tasks.language import CausalLanguage

LAYERS, WIDTH, TOKENS = 4, 64, tiny.ROWS * tiny.LENGTH


def plain_init(net, tokens):
    """Variables of a model whose attention may not run here."""
    with attention.plain():
        return net.init(jax.random.key(0), tokens)


def count(net, rows=tiny.ROWS):
    """FLOPs of a step as the loop counts them."""
    batch = tiny.batches(1, rows=rows)[0]
    mesh = parallel.Mesh(ici=(1, 1, 1)).build(jax.devices()[:1])
    with parallel.activate(mesh):
        batch = jax.tree.map(jax.numpy.asarray, batch)
        variables = jax.eval_shape(lambda: plain_init(net, batch["tokens"]))
        task = CausalLanguage()
        return train_flops(lambda v, b: task.forward(net, v, b), variables, batch)


def test_step_is_six_times_weights_and_tokens_plus_half_the_attention():
    weights = LAYERS * 12 * WIDTH**2 + tiny.VOCAB * WIDTH
    # Scores and values, 2 FLOPs a product, forward and twice backward, the half below the diagonal.
    scores = 2 * 2 * 3 * LAYERS * tiny.LENGTH * WIDTH / 2
    assert count(tiny.model(layers=LAYERS)) == TOKENS * (6 * weights + scores)


@pytest.mark.parametrize(
    "kwargs", [{"scan": False}, {"remat": "SAVE_EVERYTHING"}, {"implementation": "cudnn"}]
)
def test_the_count_does_not_depend_on_how_it_is_computed(kwargs):
    assert count(tiny.model(**kwargs)) == count(tiny.model())


def test_xla_counts_the_same_products():
    net = tiny.model(layers=2, scan=False, remat="SAVE_EVERYTHING", heads=2)
    trainer = tiny.Trainer(net=net, task=CausalLanguage(chunk=0))
    xla = trainer.compiled.cost_analysis()["flops"]
    # XLA counts the whole score matrix (ours half of it) and element-wise work, which at this width is some percent.
    scores = 2 * 2 * 3 * 2 * tiny.LENGTH * WIDTH / 2 * TOKENS
    assert xla == pytest.approx(count(net) + scores, rel=0.25)
    assert xla > count(net) + scores
